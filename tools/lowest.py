"""The lower end of every range of a package's direct dependencies, as pins for pip. Used by ``nox -s lowest``."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path

from packaging.requirements import Requirement

__all__ = ["lowest_pins"]


def lowest_pins(package: Path, extras: Collection[str] = (), *, without: Iterable[str] = ()) -> list[str]:
    """Pins such as ``safetensors==0.5``, sorted.

    Args:
        package: folder of a package.
        extras: those whose requirements count, too.
        without: names that are left as they are installed. Requirements on doran's own packages always are.

    Raises:
        ValueError: a requirement without a lower end.
    """
    project = tomllib.loads((package / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project.get("optional-dependencies", {})
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    pins = set()
    for requirement in map(Requirement, lines):
        if requirement.name.startswith("doran-") or requirement.name in without:
            continue
        ends = [clause.version for clause in requirement.specifier if clause.operator in (">=", "==")]
        if not ends:
            raise ValueError(f"{package.name}: {requirement} has no lower end")
        pins.add(f"{requirement.name}=={ends[0]}")
    return sorted(pins)
