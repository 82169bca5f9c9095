"""Packages whose names load when they are first used: torch takes two seconds to import, and a command's help none.

Imports nothing heavy.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str,
    homes: Mapping[str, str],
    *,
    distribution: str | None = None,
    renamed: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` (PEP 562) of a package.

    Args:
        package: import name.
        homes: for each public name the module below the package that has it. A module that is itself a public name is
            its own home. No other name may be that of a module: whoever imports the module would hide it.
        distribution: name in the package index, whose installed version is then the name ``__version__``.
        renamed: former names with the present ones. They go on working, with a DeprecationWarning.
    """
    namespace = sys.modules[package].__dict__
    renamed = renamed or {}

    def get(name: str) -> Any:
        if name in renamed:
            warnings.warn(f"{package}.{name} is called {renamed[name]} now", DeprecationWarning, stacklevel=2)
            return getattr(sys.modules[package], renamed[name])
        if name == "__version__" and distribution is not None:
            value: Any = version(distribution)
        elif name in homes:
            module = import_module(f"{package}.{homes[name]}")
            value = module if homes[name] == name else getattr(module, name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = value
        return value

    return get, lambda: sorted({*namespace, *homes})
