"""The subcommands of all installed doran packages, found by entry point. Imports nothing heavy.

While they are loaded, and their flags read, :func:`reading_flags` is true: a package that does something when it is
imported, as doran_hf, which makes itself known to PEFT, leaves that to the command's run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points

from doran_core.cli.command import Command

__all__ = ["GROUP", "command_entries", "load_commands", "only_flags", "reading_flags"]

GROUP = "doran.commands"
"""The entry-point group."""

_reading = False


def reading_flags() -> bool:
    """Whether the `doran` command is reading its command line, and has not begun to run."""
    return _reading


@contextlib.contextmanager
def only_flags() -> Iterator[None]:
    """Within this, :func:`reading_flags` is true."""
    global _reading
    before, _reading = _reading, True
    try:
        yield
    finally:
        _reading = before


def command_entries() -> dict[str, EntryPoint]:
    """Every installed subcommand by name, not yet loaded."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def load_commands(entries: Mapping[str, EntryPoint]) -> dict[str, Command]:
    """Load subcommands. One that cannot be loaded is left out with a warning: the others are not to suffer."""
    commands: dict[str, Command] = {}
    for name, entry in entries.items():
        try:
            command = entry.load()
        except Exception as error:
            print(f"doran: warning: the command {name!r} cannot be loaded: {error}", file=sys.stderr)
            continue
        commands[name] = command
    return commands
