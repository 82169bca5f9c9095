"""Code blocks of Markdown pages: found by sybil, run by language.

A block runs unless a comment right before it says why it cannot: ``<!-- checked only: needs a GPU -->``. Then Python is
compiled and its imports of doran are looked up, and a shell block's commands are held against their parsers. A fence's
``title="FILE"`` also writes the block to that file, in the folder in which the page's blocks run.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from shell import check_command, run_command, shell_commands
from sybil import Document, Region, Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

__all__ = ["Block", "blocks_of", "evaluate"]

_FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[\w+-]*)(?P<attributes>[^\n]*)\n"))
_MARK = re.compile(r"<!-- checked only: (?P<reason>.+?) -->\s*$")
_TITLE = re.compile(r'title="([^"]+)"')
_SHOWN = ("text", "ini", "dockerfile", "math")
"""Languages of what is only shown: formulas, outputs."""


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: the file.
        line: of its first fence, from 1.
        language: "" where the fence names none.
        title: file to write it to, or None.
        source: its text.
        reason: why it is only checked, or None.
    """

    page: Path
    line: int
    language: str
    title: str | None
    source: str
    reason: str | None

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    document = Sybil(parsers=[_regions], path=str(page.parent)).parse(page)
    return [_block(page, document, region) for _, region in document.regions]


def _regions(document: Document) -> Iterator[Region]:
    for region in _FENCES(document):
        yield Region(region.start, region.end, parsed=region.lexemes)


def _block(page: Path, document: Document, region: Region) -> Block:
    mark = _MARK.search(document.text[: region.start])
    title = _TITLE.search(region.parsed["attributes"])
    return Block(
        page,
        document.text.count("\n", 0, region.start) + 1,
        region.parsed["language"],
        title[1] if title else None,
        str(region.parsed["source"]),
        mark["reason"] if mark else None,
    )


def evaluate(block: Block, namespace: dict[str, Any]) -> None:
    """Run or check one block, in the current directory.

    Args:
        block: the block.
        namespace: of the page's Python blocks; changed.

    Raises:
        AssertionError: a language that nothing is known of, or a command that does not hold.
    """
    if block.title is not None:
        Path(block.title).write_text(block.source, encoding="utf-8")
    if block.language == "python":
        (_run_python if block.reason is None else _check_python)(block, namespace)
    elif block.language == "sh":
        for command in shell_commands(block.source, block.place):
            (run_command if block.reason is None else check_command)(command, block.place)
    elif block.language == "yaml":
        yaml.safe_load(block.source)
    elif block.language == "json":
        json.loads(block.source)
    else:
        assert block.language in _SHOWN, (
            f"{block.place}: language {block.language!r}, expected python, sh, yaml, json, {_SHOWN}"
        )


def _compiled(block: Block) -> Any:
    return compile("\n" * block.line + block.source, str(block.page), "exec", dont_inherit=True)


def _run_python(block: Block, namespace: dict[str, Any]) -> None:
    exec(_compiled(block), namespace)


def _check_python(block: Block, namespace: dict[str, Any]) -> None:
    _compiled(block)
    for node in ast.walk(ast.parse(block.source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("doran_"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.place}: {node.module} has no {alias.name}"
