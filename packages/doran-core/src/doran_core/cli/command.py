"""What a subcommand of `doran` is: one record, named by an entry point of the group "doran.commands".

A module that holds one is imported for `doran --help`: it imports torch and the like only when the command runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from doran_core.cli.tables import Table

__all__ = ["GROUPS", "Command", "Outcome"]

GROUPS = ("train", "adapters", "export", "serve", "shell")
"""Headings of `doran --help`, in their order. A command of another group comes after them."""


@dataclass(frozen=True)
class Outcome:
    """What a command found or wrote.

    Attributes:
        data: JSON-ready; printed by --json.
        shown: lines and tables for people; printed without --json.
    """

    data: Mapping[str, Any]
    shown: Sequence[str | Table] = ()


@dataclass(frozen=True)
class Command:
    """A subcommand. Its name is the entry point's.

    Attributes:
        summary: a few words, for `doran --help`.
        description: for its own help.
        group: one of :data:`GROUPS`, or a heading of its own.
        add_arguments: adds its flags to a parser. It also gets the command line, so that flags that are costly to
            know are added only if one is there; None asks for all of them.
        run: does it. It may print progress; the result is what it returns.
        examples: command lines for its help.
        passes_unknown: flags that it does not know are left in ``arguments.unknown`` instead of being refused.
        notes: a paragraph for the end of its help.
    """

    summary: str
    description: str
    group: str
    add_arguments: Callable[[argparse.ArgumentParser, Sequence[str] | None], None]
    run: Callable[[argparse.Namespace], Outcome]
    examples: Sequence[str] = field(default=())
    passes_unknown: bool = False
    notes: str = ""
