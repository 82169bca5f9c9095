"""The class of `doran`'s subcommands: click commands that return an :class:`Outcome`.

Entry points of the group "doran.commands" name the subcommands. `doran --help` imports their modules, so these import
torch and other large libraries only when a command runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from doran_core.cli.tables import Table, show
from doran_core.cli.terminal import drop_output, json_for

__all__ = ["GROUPS", "DoranCommand", "Outcome", "command", "only_flags", "reading_flags", "wants_json", "write_lines"]

GROUPS = ("train", "adapters", "export", "serve", "shell")
"""Headings of `doran --help`, in order. Commands of other groups come last."""

_reading = False


def reading_flags() -> bool:
    """Whether `doran` is still parsing its command line.

    While it does, packages postpone imports that have side effects: doran_hf does not import PEFT.
    """
    return _reading


@contextlib.contextmanager
def only_flags(value: bool = True) -> Iterator[None]:
    """Context in which :func:`reading_flags` returns this value."""
    global _reading
    before, _reading = _reading, value
    try:
        yield
    finally:
        _reading = before


@dataclass(frozen=True)
class Outcome:
    """A command's result.

    Attributes:
        data: JSON-ready; printed by --json.
        shown: lines and tables for people; printed without --json.
    """

    data: Mapping[str, Any]
    shown: Sequence[str | Table] = ()


class DoranCommand(click.Command):
    """A click command with --json and --debug, whose callback returns an :class:`Outcome`.

    Args:
        group: heading in `doran --help`: one of :data:`GROUPS`, or a new one.
        examples: command lines for the help text.
    """

    def __init__(self, *args: Any, group: str, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.group, self.examples = group, tuple(examples)
        self.params += [
            click.Option(
                ["--json", "as_json"], is_flag=True, help="Print the result as JSON, and nothing else, to the output."
            ),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]

    def invoke(self, ctx: click.Context) -> None:
        """Run the command and print its outcome."""
        as_json = ctx.meta["doran.json"] = ctx.params.pop("as_json")
        del ctx.params["debug"]
        with only_flags(False):
            if not as_json:
                outcome = super().invoke(ctx)
                return _print(lambda: show(outcome.shown))
            with contextlib.redirect_stdout(sys.stderr):  # messages that libraries print
                outcome = super().invoke(ctx)
        data = _finite(outcome.data)
        text = json_for(json.dumps(data, indent=2, ensure_ascii=False), json.dumps(data, indent=2))
        return _print(lambda: print(text))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, then the notes."""
        write_lines(formatter, "Examples", self.examples)
        super().format_epilog(ctx, formatter)


def write_lines(formatter: click.HelpFormatter, title: str, lines: Sequence[str]) -> None:
    """Write a section of a help text whose lines stay as they are."""
    if lines:
        with formatter.section(title):
            formatter.write("".join(f"{'':{formatter.current_indent}}{line}\n" for line in lines))


def command(*, group: str, examples: Sequence[str] = (), **options: Any) -> Callable[[Callable[..., Outcome]], Any]:
    """Decorator that makes a :class:`DoranCommand` of a function returning an :class:`Outcome`; options as click's."""
    return click.command(cls=DoranCommand, group=group, examples=examples, **options)


def wants_json() -> bool:
    """Whether the running command was given --json."""
    return bool(click.get_current_context().meta["doran.json"])


def _print(write: Callable[[], None]) -> None:
    """Print to standard output. If the reader has closed it, as `head` does, drop the rest.

    Raises:
        OSError: the output cannot be written; for example, the disk is full.
    """
    try:
        write()
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
    except OSError:
        drop_output()
        raise


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
