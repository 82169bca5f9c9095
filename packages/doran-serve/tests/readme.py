"""The README's Python code, to be run as it stands there but for paths and addresses."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def python_block(part: str) -> str:
    """The one Python block of the README with `part` in it."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (found,) = [block for block in blocks if part in block]
    return str(found)


def run_readme(part: str, replaced: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Run a block in this process; returns what it prints and the names that it leaves."""
    code = python_block(part)
    for text, other in replaced.items():
        assert text in code, text
        code = code.replace(text, other)
    printed = io.StringIO()
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue(), names
