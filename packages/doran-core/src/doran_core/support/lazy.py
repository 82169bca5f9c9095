"""Packages whose names load when they are first used: torch takes two seconds to import, and a command's help none.

A lazy package lists its names once, in the stub ``__init__.pyi`` beside its ``__init__.py``: type checkers read the
stub, and :func:`lazy_names` does. Imports nothing heavy.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["lazy_names", "renamed_names", "stub_names"]


def lazy_names(
    package: str,
    *,
    distribution: str | None = None,
    renamed: Mapping[str, str] | None = None,
    first: str | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The ``__getattr__``, ``__dir__`` (PEP 562) and ``__all__`` of a package with an ``__init__.pyi``.

    Args:
        package: import name.
        distribution: name in the package index, whose installed version is then the name ``__version__``.
        renamed: former names with the present ones; see :func:`renamed_names`.
        first: a module that is imported before the first name is.
    """
    module = sys.modules[package]
    namespace = module.__dict__
    homes = stub_names(Path(str(module.__file__)).with_suffix(".pyi"))

    def get(name: str) -> Any:
        if name == "__version__" and distribution is not None:
            value: Any = version(distribution)
        elif name in homes:
            if first is not None:
                import_module(first)
            home = import_module(f"{homes[name]}.{name}" if homes[name] == package else homes[name])
            value = home if homes[name] == package else getattr(home, name)
        else:
            return _present(package, renamed or {}, name)
        namespace[name] = value
        return value

    return get, lambda: sorted({*namespace, *homes}), sorted(homes)


def renamed_names(package: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` (PEP 562) for former names, which still work, with a DeprecationWarning.

    Args:
        package: import name of the package or module that has the names.
        renamed: each former name with the present one.
    """

    return lambda name: _present(package, renamed, name)


def _present(package: str, renamed: Mapping[str, str], name: str) -> Any:
    if name not in renamed:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    warnings.warn(f"{package}.{name} is called {renamed[name]} now", DeprecationWarning, stacklevel=3)
    return getattr(sys.modules[package], renamed[name])


def stub_names(stub: Path) -> dict[str, str]:
    """The names that a stub imports, each with the module that it is imported from.

    A submodule that is itself a name is imported from its package. No other name may be that of a submodule:
    importing the submodule would hide the name.
    """
    statements = ast.parse(stub.read_text(encoding="utf-8")).body
    imports = [statement for statement in statements if isinstance(statement, ast.ImportFrom)]
    return {alias.name: str(statement.module) for statement in imports for alias in statement.names}
