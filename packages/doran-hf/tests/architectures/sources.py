"""What the classes of transformers do with their layers, from its sources: which weights are read, which called."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import transformers

_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")
_FACTS = (
    "data", "data_ptr", "device", "dim", "dtype", "element_size", "grad", "is_cuda", "is_meta", "itemsize", "ndim",
    "new_zeros", "numel", "requires_grad", "shape", "size", "type",
)  # fmt: skip
"""Of a weight: reading one of these is not reading its values."""
_READ = re.compile(rf"self\.\w+\.weight\b(?!\.({'|'.join(_FACTS)})\b)")


def read_layers() -> dict[str, dict[str, bool]]:
    """For each class the linear layers and convolutions whose weight it reads, and whether it calls them, too."""
    found: dict[str, dict[str, bool]] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").rglob("modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if not _READ.search(source):
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and (layers := _read_in(node)):
                found[node.name] = layers
    return found


def _read_in(node: ast.ClassDef) -> dict[str, bool]:
    made, read, called = set(), set(), set()
    for function in [part for part in node.body if isinstance(part, ast.FunctionDef)]:
        if "init" in function.name:
            made |= set(_made(function))
            continue
        parents = {child: parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
        for part in ast.walk(function):
            if isinstance(part, ast.Call) and (name := _own(part.func)):
                called.add(name)
            if isinstance(part, ast.Attribute) and part.attr == "weight" and (name := _own(part.value)):
                user = parents.get(part)
                if not (isinstance(user, ast.Attribute) and user.attr in _FACTS):
                    read.add(name)
    return {name: name in called for name in sorted(read & made)}


def _made(function: ast.FunctionDef) -> Iterator[str]:
    for part in ast.walk(function):
        made = part.value if isinstance(part, ast.Assign) and isinstance(part.value, ast.Call) else None
        if made is not None and ast.unparse(made.func).rpartition(".")[2] in _LAYERS:
            yield from (name for target in part.targets if (name := _own(target)))


def _own(node: ast.AST) -> str | None:
    """x of ``self.x``."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own else None
