"""The click group `doran`: its subcommands are those of all installed doran packages, each loaded when it is needed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, MutableMapping, Sequence
from importlib.metadata import EntryPoint, entry_points

import click

from doran_core.cli.command import GROUPS, DoranCommand, only_flags, write_lines
from doran_core.cli.exit_codes import MEANINGS
from doran_core.cli.versions import installed_versions

__all__ = ["ENTRY_POINTS", "doran", "parse"]

ENTRY_POINTS = "doran.commands"
"""The entry-point group that names the subcommands."""

_EXAMPLES = (
    "doran train --init                      # writes doran.yaml, to be filled in",
    "doran train doran.yaml",
    "doran inspect run/adapter --base base",
    "doran merge --base base --adapter run/adapter --out merged",
    "doran export --model merged --out onnx",
    "doran serve base --adapters adapters",
)


class _Installed(MutableMapping[str, click.Command]):
    """Subcommands by name. Names come from entry points; a command is imported when it is used."""

    def __init__(self) -> None:
        self._loaded: dict[str, click.Command] = {}

    def _entries(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name)}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._loaded:
            self[name] = self._entries()[name].load()
        return self._loaded[name]

    def __setitem__(self, name: str, value: click.Command) -> None:
        self._loaded[name] = value

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())


class _Group(click.Group):
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a subcommand; None if it is not installed.

        Raises:
            UsageError: it is installed, but its module cannot be imported.
        """
        if cmd_name not in self.commands:
            return None
        try:
            return self.commands[cmd_name]
        except Exception as error:  # an import can raise anything
            raise click.UsageError(f"the command {cmd_name!r} is installed, but cannot be loaded: {error}") from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the subcommands under the headings of their groups, then examples and exit codes."""
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for name in self.list_commands(ctx):
            try:
                found = self.get_command(ctx, name)
            except click.UsageError as error:  # the other commands still work
                print(f"doran: warning: {error.message}", file=sys.stderr)
                continue
            assert isinstance(found, DoranCommand)
            groups.setdefault(found.group, []).append((name, found.get_short_help_str(limit=80)))
        for group, rows in groups.items():
            if rows:
                with formatter.section(group.capitalize()):
                    formatter.write_dl(rows)
        write_lines(formatter, "Examples", _EXAMPLES)
        write_lines(formatter, "Exit codes", [line for code in MEANINGS for line in _exit_code(code)])


def _exit_code(code: int) -> list[str]:
    return textwrap.wrap(MEANINGS[code], 72, initial_indent=f"{code:<5}", subsequent_indent=" " * 5)


def _print_versions(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    if given:
        click.echo("\n".join(f"{name} {version}" for name, version in installed_versions().items()))
        ctx.exit()


doran = _Group(
    "doran",
    commands=_Installed(),
    help="Train, merge, convert, export and serve DoRAN adapters (arXiv 2510.04331).",
    epilog="More on each: doran COMMAND --help",
    no_args_is_help=False,
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_versions,
            help="Print the installed doran packages and stop.",
        ),
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error."),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
"""The command `doran`."""


def parse(argv: Sequence[str]) -> click.Context:
    """Read a command line without running it; its subcommand's flags are in ``params``.

    Args:
        argv: a subcommand and its flags.

    Raises:
        UsageError: there is no such subcommand or flag, or a value is wrong.
    """
    parent = click.Context(doran, info_name="doran")
    with only_flags():
        name, found, rest = doran.resolve_command(parent, list(argv))
        assert found is not None
        return found.make_context(name, rest, parent=parent)
