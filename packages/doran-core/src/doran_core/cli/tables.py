"""Tables: drawn by rich on a terminal if rich is installed, else plain columns for grep and awk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from doran_core.cli.terminal import printable

__all__ = ["Table", "show"]


@dataclass(frozen=True)
class Table:
    """A table of text: the first column is left-aligned, the others right-aligned.

    Attributes:
        header: names of the columns; empty for a list of facts, whose columns are all left-aligned.
        rows: each as long as the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def printable(self) -> Table:
        """A copy with each cell on one line and control characters escaped."""
        rows = [[printable(cell).replace("\n", "\\n") for cell in row] for row in self.rows]
        return Table([printable(name) for name in self.header], rows)

    def plain(self) -> str:
        """Lines of columns two spaces apart."""
        if not self.header:
            width = max((len(name) for name, *_ in self.rows), default=0)
            return "\n".join("  ".join([name.ljust(width), *values]).rstrip() for name, *values in self.rows)
        lines = [self.header, *self.rows]
        widths = [max(len(row[column]) for row in lines) for column in range(len(self.header))]
        cells = [self.header, ["-" * width for width in widths], *self.rows]
        return "\n".join(self._line(row, widths) for row in cells)

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *others]).rstrip()


def show(parts: Sequence[str | Table]) -> None:
    """Print lines and tables to standard output."""
    drawn = sys.stdout.isatty() and find_spec("rich") is not None
    for part in parts:
        if isinstance(part, str):
            print(printable(part))
        elif drawn:
            _draw(part.printable())
        else:
            print(part.printable().plain())


def _draw(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD if table.header else None, show_header=bool(table.header), pad_edge=False)
    for column, name in enumerate(table.header or table.rows[0] if table.rows else table.header):
        left = column == 0 or not table.header
        drawn.add_column(Text(name) if table.header else "", justify="left" if left else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))  # rich would read brackets in a str as markup
    Console().print(drawn)
