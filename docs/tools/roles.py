"""Sphinx's roles in docstrings, such as ``:class:`~doran_core.Tau` ``, as links that MkDocs understands."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from public_names import public_names

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`(~?)([\w.]+)`")
LITERAL = re.compile(r"::$", re.MULTILINE)
"""Before a literal block. Markdown needs the indentation alone."""


class Roles(griffe.Extension):
    """Rewrites each docstring as it is loaded."""

    def __init__(self) -> None:
        self.homes = {f"{name.module}.{name.name}": name.home for name in public_names() if not name.is_module}
        self.homes |= {home: home for home in self.homes.values()}

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Of every module, class, function and attribute."""
        if obj.docstring is not None:
            text = ROLE.sub(self._link, obj.docstring.value)
            obj.docstring.value = LITERAL.sub(lambda match: "" if _alone(match) else ":", text)

    def _link(self, match: re.Match[str]) -> str:
        short, path = match[1] == "~", match[2]
        shown = f"`{path.rpartition('.')[2] if short else path}`"
        return f"[{shown}][{self.homes[path]}]" if path in self.homes else shown


def _alone(match: re.Match[str]) -> bool:
    """Whether the line has nothing else."""
    return match.start() == 0 or match.string[match.start() - 1] == "\n"
