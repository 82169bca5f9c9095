"""The reference of the command line: what `--help` prints, command by command."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

import click
from places import PACKAGES, REPOSITORY

from doran_core.cli.command import only_flags
from doran_core.cli.group import doran

__all__ = ["cli_page"]


def cli_page() -> str:
    """The page in Markdown. A command that is not installed, or cannot be imported, is an error."""
    top = click.Context(doran, info_name="doran", max_content_width=100)
    parts = ["# Command line\n", "Each package adds its commands to the one command `doran`.\n", _help(doran, top)]
    with only_flags():
        for name in sorted(_declared()):
            command = doran.commands[name]
            context = click.Context(command, info_name=name, parent=top, max_content_width=100)
            parts += [f"## doran {name}\n", _help(command, context)]
    return "\n".join(parts)


def _help(command: click.Command, context: click.Context) -> str:
    return f"```text\n{command.get_help(context)}\n```\n"


def _declared() -> Iterator[str]:
    for package in PACKAGES:
        project = REPOSITORY / "packages" / f"doran-{package}" / "pyproject.toml"
        scripts = tomllib.loads(project.read_text(encoding="utf-8"))["project"].get("entry-points", {})
        yield from scripts.get("doran.commands", {})
