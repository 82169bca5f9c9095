"""The public names of the four packages, read from the source without importing it.

Public is what a module's ``__all__`` or a lazy package's ``__init__.pyi`` lists, in every module whose path has no part
that begins with an underscore.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import griffe
from places import PACKAGES, REPOSITORY

from doran_core.support.lazy import stub_names

__all__ = ["PublicName", "names_of_module", "public_names"]


@dataclass(frozen=True)
class PublicName:
    """A name as a module lists it, and the path at which the object is defined."""

    module: str
    name: str
    home: str
    is_module: bool


@cache
def public_names() -> tuple[PublicName, ...]:
    """Every public name of the four packages; one that several modules list comes once for each."""
    loader = griffe.GriffeLoader(search_paths=[REPOSITORY / "packages" / f"doran-{name}" / "src" for name in PACKAGES])
    packages = [loader.load(f"doran_{name}") for name in PACKAGES]
    loader.resolve_aliases()
    found = []
    for package in packages:
        assert isinstance(package, griffe.Module)
        for module in _modules(package):
            found += [_public(module, name) for name in _listed(module)]
    return tuple(found)


def names_of_module(path: str) -> tuple[PublicName, ...]:
    """What one module lists.

    Raises:
        KeyError: no module of this path lists anything.
    """
    names = tuple(name for name in public_names() if name.module == path)
    if not names:
        raise KeyError(f"{path}: no such module, or one without __all__")
    return names


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for child in module.modules.values():
        if not child.is_alias and not child.name.startswith("_"):
            yield from _modules(child)


def _listed(module: griffe.Module) -> list[str]:
    stub = module.filepath.with_suffix(".pyi") if isinstance(module.filepath, Path) else None
    return sorted(stub_names(stub)) if stub and stub.is_file() else [str(name) for name in module.exports or ()]


def _public(module: griffe.Module, name: str) -> PublicName:
    member = module.members.get(name)
    if member is None:
        raise KeyError(f"{module.path}.{name} is in __all__, but not in the module")
    home = member.canonical_path
    return PublicName(module.path, name, home, is_module=member.is_module)
