"""The `doran` command's exit codes and their meaning. Imports nothing."""

from __future__ import annotations

__all__ = ["BUG", "CHECK_FAILED", "INTERRUPTED", "MEANINGS", "OK", "SYSTEM", "USAGE"]

OK = 0
CHECK_FAILED = 1
USAGE = 2  # argparse's own
BUG = 70  # sysexits' EX_SOFTWARE
SYSTEM = 74  # sysexits' EX_IOERR
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

MEANINGS = {
    OK: "done",
    CHECK_FAILED: "done and checked, and the check does not hold: an export's proof, an adapter of doran serve --check",
    USAGE: "wrong flags, configuration, files or base, or a package that is not installed",
    BUG: "a bug in doran, or an error of a library that nobody foresaw",
    SYSTEM: "the machine refused: disk full, no permission, out of memory",
    INTERRUPTED: "interrupted",
}
"""By code, as the help prints them."""
