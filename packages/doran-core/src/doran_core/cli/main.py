"""The `doran` command: runs a subcommand, prints its result, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from doran_core.cli import exit_codes
from doran_core.cli.loading import command_entries, load_commands, only_flags
from doran_core.cli.parser import make_parser
from doran_core.cli.tables import show
from doran_core.errors import CheckFailedError, ConfigError, DoranError

__all__ = ["build_parser", "main"]


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        argv: the command line. Only the subcommand that it names is loaded, and only that one gets its flags. By
            default all are loaded with all their flags, which may import large packages.

    Raises:
        ConfigError: it names a subcommand that is not installed, or that cannot be loaded.
    """
    entries = command_entries()
    wanted = None if argv is None else next((argument for argument in argv if not argument.startswith("-")), None)
    if wanted is not None and wanted not in entries:
        near = get_close_matches(wanted, entries, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(entries)}."
        raise ConfigError(f"unknown command {wanted!r}; {hint} See: doran --help")
    with only_flags():
        commands = load_commands(entries if wanted is None else {wanted: entries[wanted]})
        if wanted is not None and wanted not in commands:
            raise ConfigError(f"the command {wanted!r} is installed, but cannot be loaded")
        return make_parser(commands, argv, complete=list(commands) if argv is None else [wanted or ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return one of :mod:`doran_core.cli.exit_codes`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parse(argv)
        if not arguments.json:
            show(arguments.command.run(arguments).shown)
            return exit_codes.OK
        with contextlib.redirect_stdout(sys.stderr):  # what the libraries print on their way
            outcome = arguments.command.run(arguments)
        print(json.dumps(_finite(outcome.data), indent=2, ensure_ascii=False))
        return exit_codes.OK
    except KeyboardInterrupt:
        print("doran: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        sys.stderr.close()
        return exit_codes.OK
    except Exception as error:
        if "--debug" in argv:
            raise
        sentence, code = _explain(error)
        print(f"doran: {sentence}", file=sys.stderr)
        return code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    arguments, unknown = build_parser(argv).parse_known_args(argv)
    if unknown and not arguments.command.passes_unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.unknown = unknown
    return arguments


def _explain(error: Exception) -> tuple[str, int]:
    """An error as one sentence, and its exit code."""
    text = " ".join(str(error).split())
    if isinstance(error, CheckFailedError):
        return f"error: {error}", exit_codes.CHECK_FAILED
    if isinstance(error, DoranError):
        return f"error: {error}", exit_codes.USAGE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not to be imported here
        return f"error: out of memory: {text}", exit_codes.SYSTEM
    if isinstance(error, OSError):
        return f"error: {text}", exit_codes.SYSTEM
    frame = traceback.extract_tb(error.__traceback__)[-1]
    sentence = (
        f"bug: {type(error).__name__}: {text} ({frame.filename}, line {frame.lineno}). This should not have happened: "
        "run it again with --debug for the traceback, and report that with the output of `doran --version`"
    )
    return sentence, exit_codes.BUG


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
