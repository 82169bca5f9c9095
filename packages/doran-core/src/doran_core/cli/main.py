"""The `doran` command: loads the subcommands of all installed doran packages and turns errors into one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from doran_core.adapter.schema import created_by
from doran_core.errors import DoranError

__all__ = ["build_parser", "main"]

_GROUP = "doran.commands"


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser with every installed subcommand. One that cannot be loaded is left out with a warning.

    Args:
        argv: the command line. If it names a subcommand, that one alone is loaded: others may import large packages.
    """
    parser = argparse.ArgumentParser(
        prog="doran", description="Train, merge, convert, export and serve DoRAN adapters."
    )
    parser.add_argument("--version", action="version", version=created_by())
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    entries = sorted(entry_points(group=_GROUP), key=lambda entry: entry.name)
    wanted = next((argument for argument in argv if not argument.startswith("-")), None)
    for entry in [entry for entry in entries if entry.name == wanted] or entries:
        try:
            register = entry.load()
        except Exception as error:
            print(f"doran: warning: the command {entry.name!r} cannot be loaded: {error}", file=sys.stderr)
            continue
        register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 for an error of the user, 130 for an interrupt."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser(argv).parse_args(argv)
    try:
        return int(arguments.func(arguments))
    except DoranError as error:
        if arguments.debug:
            raise
        print(f"doran: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("doran: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        sys.stderr.close()
        return 0
