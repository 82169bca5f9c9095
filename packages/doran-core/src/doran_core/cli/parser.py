"""The parser: help in groups with examples, errors in one sentence that name the nearest flag or command."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from doran_core.cli.command import GROUPS, Command
from doran_core.cli.exit_codes import MEANINGS, USAGE
from doran_core.cli.versions import installed_versions

__all__ = ["Parser", "make_parser"]

_EXAMPLES = (
    "doran train --init                      # writes doran.yaml, to be filled in",
    "doran train doran.yaml",
    "doran inspect run/adapter --base base",
    "doran merge --base base --adapter run/adapter --out merged",
    "doran export --model merged --out onnx",
    "doran serve base --adapters adapters",
)


class Parser(argparse.ArgumentParser):
    """argparse's parser. Flags are written in full; for one that it does not know, the error names the nearest."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)
        self.groups: dict[str, list[str]] = {}
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; keeps the arguments for the message of an error."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with one sentence; the usage of a command with a hundred flags would only hide it."""
        near = self._nearest()
        hint = f"; did you mean {', '.join(near)}? " if near else ". "
        self.exit(USAGE, f"{self.prog}: error: {message}{hint}See: {self.prog} --help\n")

    def _nearest(self) -> list[str]:
        """For each flag on the command line that is not known the nearest one."""
        flags = [argument.partition("=")[0] for argument in self._given if re.match(r"--?[A-Za-z]", argument)]
        known = list(self._option_string_actions)
        return [name for flag in flags if flag not in known for name in get_close_matches(flag, known, 1, 0.6)]

    def format_help(self) -> str:
        """As argparse's, with the subcommands in their groups."""
        subcommands = next((a for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        if subcommands is None:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        listed = {action.dest: action for action in subcommands._choices_actions}
        for group, names in self.groups.items():
            formatter.start_section(group)
            formatter.add_arguments([listed[name] for name in names])
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments([action for action in self._actions if action is not subcommands])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


class _Version(argparse.Action):
    """Prints the installed packages and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print("\n".join(f"{name} {version}" for name, version in installed_versions().items()))
        parser.exit()


def make_parser(
    commands: Mapping[str, Command], argv: Sequence[str] | None, *, complete: Sequence[str]
) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        commands: the subcommands to list.
        argv: the command line, or None for every flag there is.
        complete: names of those that get their flags.
    """
    parser = Parser(
        prog="doran",
        description="Train, merge, convert, export and serve DoRAN adapters (arXiv 2510.04331).",
        epilog="\n\n".join([_section("examples", _EXAMPLES), _exit_codes(), "More on each: doran COMMAND --help"]),
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the installed doran packages and stop")
    _add_debug(parser, default=False)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, command in commands.items():
        _add_command(subparsers, name, command, argv, complete=name in complete)
    for group in dict.fromkeys([*GROUPS, *(command.group for command in commands.values())]):
        if names := [name for name, command in commands.items() if command.group == group]:
            parser.groups[group] = names
    return parser


def _add_command(
    subparsers: argparse._SubParsersAction[Any],
    name: str,
    command: Command,
    argv: Sequence[str] | None,
    *,
    complete: bool,
) -> None:
    parts = [_section("examples", command.examples)] if command.examples else []
    if command.notes:
        parts.append(_paragraph(command.notes))
    parser = subparsers.add_parser(
        name, help=command.summary, description=_paragraph(command.description), epilog="\n\n".join(parts)
    )
    if not complete:
        return
    command.add_arguments(parser, argv)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else, to the output")
    _add_debug(parser, default=argparse.SUPPRESS)
    parser.set_defaults(command=command, parser=parser)


def _add_debug(parser: argparse.ArgumentParser, *, default: Any) -> None:
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def _section(title: str, lines: Sequence[str]) -> str:
    return f"{title}:\n" + "\n".join(f"  {line}" for line in lines)


def _exit_codes() -> str:
    lines = []
    for code, meaning in MEANINGS.items():
        lines += textwrap.wrap(meaning, 72, initial_indent=f"{code:<5}", subsequent_indent=" " * 5)
    return _section("exit codes", lines)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 100)
