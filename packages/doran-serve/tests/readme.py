"""The README's Python code, to be run as it stands there but for paths and addresses."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def python_block(part: str) -> str:
    """The one Python block of the README with `part` in it."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (found,) = [block for block in blocks if part in block]
    return str(found)


def run_readme(part: str, replaced: Mapping[str, str]) -> str:
    """Run a block in this process; returns what it prints."""
    code = python_block(part)
    for text, other in replaced.items():
        assert text in code, text
        code = code.replace(text, other)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    return printed.getvalue()
