"""`doran completion`: a script that completes commands, flags and paths in a shell. Made by shtab from the parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from doran_core.cli.command import Command, Outcome
from doran_core.errors import require

__all__ = ["COMMAND"]

SHELLS = ("bash", "zsh")


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    parser.add_argument("shell", choices=SHELLS, help="your shell")


def _run(arguments: argparse.Namespace) -> Outcome:
    from doran_core.cli.main import build_parser

    shtab = require("shtab", package="doran-core", extra="cli", purpose="shell completion")
    parser = build_parser()
    for action in _actions(parser):
        if action.choices is None and str(action.metavar).endswith("DIR"):
            action.complete = shtab.DIRECTORY
        elif action.choices is None and str(action.metavar).endswith(("FILE", ".yaml")):
            action.complete = shtab.FILE
    script = shtab.complete(parser, arguments.shell)
    return Outcome({"shell": arguments.shell, "script": script}, [script])


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


COMMAND = Command(
    summary="print a script that completes doran's commands and flags",
    description="Print a shell's completion script for the commands that are installed now. Needs shtab: pip install "
    "'doran-core[cli]'.",
    group="shell",
    add_arguments=_add_arguments,
    run=_run,
    examples=(
        "doran completion bash > ~/.local/share/bash-completion/completions/doran",
        "doran completion zsh > ~/.zfunc/_doran    # with fpath+=~/.zfunc before compinit",
    ),
)
