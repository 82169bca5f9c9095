"""The `doran` command's exit codes and their meaning. Imports nothing."""

from __future__ import annotations

__all__ = ["BUG", "CHECK_FAILED", "INTERRUPTED", "MEANINGS", "OK", "SYSTEM", "USAGE"]

OK = 0
CHECK_FAILED = 1
USAGE = 2  # as click has it
BUG = 70  # sysexits' EX_SOFTWARE
SYSTEM = 74  # sysexits' EX_IOERR
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

MEANINGS = {
    OK: "done",
    CHECK_FAILED: "done, but a check failed: an export's proof, or an adapter of doran serve --check",
    USAGE: "wrong flags, configuration, files or base, or a package that is not installed",
    BUG: "a bug in doran, or an unexpected error of a library",
    SYSTEM: "a limit of the machine: disk full, no permission, out of memory",
    INTERRUPTED: "interrupted",
}
"""What each code means, as the help prints it."""
