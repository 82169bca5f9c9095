"""The reference of the command line, made from the parsers themselves."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Iterator

from places import PACKAGES, REPOSITORY

from doran_core.cli.main import build_parser

__all__ = ["cli_page", "subparsers"]


def subparsers() -> dict[str, argparse.ArgumentParser]:
    """Every subcommand's parser, by name.

    Raises:
        RuntimeError: a command that a pyproject.toml declares is not there: its package is not installed.
    """
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    missing = set(_declared()) - set(action.choices)
    if missing:
        raise RuntimeError(f"doran commands that cannot be loaded: {sorted(missing)}; install all four packages")
    return dict(action.choices)


def _declared() -> Iterator[str]:
    for package in PACKAGES:
        project = REPOSITORY / "packages" / f"doran-{package}" / "pyproject.toml"
        scripts = tomllib.loads(project.read_text(encoding="utf-8"))["project"].get("entry-points", {})
        yield from scripts.get("doran.commands", {})


def cli_page() -> str:
    """The page in Markdown."""
    os.environ["COLUMNS"] = "88"  # argparse wraps the usage lines at it
    parser = build_parser()
    parts = [
        "# Command line\n",
        "Made from the parsers when this site is built. Each package adds its commands to the one command `doran`.\n",
        *_command(parser, hide_commands=True),
    ]
    for name, command in sorted(subparsers().items()):
        parts += [f"## doran {name}\n", *_command(command)]
    return "\n".join(parts)


def _command(parser: argparse.ArgumentParser, *, hide_commands: bool = False) -> Iterator[str]:
    if parser.description:
        yield _text(parser.description)
    yield f"```text\n{parser.format_usage().strip()}\n```\n"
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
        if hide_commands:
            actions = [a for a in actions if not isinstance(a, argparse._SubParsersAction)]
        if not actions:
            continue
        yield f"**{(group.title or 'options').capitalize()}**\n"
        if group.description:
            yield _text(group.description)
        yield "| argument | meaning |\n|---|---|"
        yield from (f"| {_spelling(parser, action)} | {_meaning(parser, action)} |" for action in actions)
        yield ""
    if parser.epilog:
        yield _text(parser.epilog)


def _text(text: str) -> str:
    """Prose as prose; what has lines of its own, such as examples, as it stands."""
    text = text.strip()
    return f"```text\n{text}\n```\n" if "\n  " in text else f"{' '.join(text.split())}\n"


def _spelling(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action)).replace("|", "\\|")
    if not action.option_strings:
        return f"`{value}`"
    spelling = action.option_strings[0] if action.option_strings[0].startswith("--") else action.option_strings[-1]
    others = [s for s in action.option_strings if s != spelling and s.replace("-", "_") != spelling.replace("-", "_")]
    names = ", ".join(f"`{name}`" for name in [*others, spelling])
    return names[:-1] + (f" {value}`" if value and action.nargs != 0 else "`")


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    needed = ", required" if action.required and action.option_strings else ""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") + needed
