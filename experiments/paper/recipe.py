"""A recipe: a benchmark with all its settings, and of each whether it is the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import ExperimentError
from experiments.paper.commonsense import Commonsense
from experiments.paper.fgvc import FGVC
from experiments.paper.vtab import VTAB

__all__ = ["BENCHMARKS", "RECIPES", "Recipe", "Setting", "load_recipe"]

RECIPES = Path(__file__).parents[1] / "recipes"
BENCHMARKS: dict[str, VTAB | FGVC | Commonsense] = {"vtab1k": VTAB(), "fgvc": FGVC(), "commonsense": Commonsense()}
_SECTIONS = ("data", "adapter", "trainer", "evaluation")
_KEYS = {"benchmark", "settings", "methods"}
_SOURCES = ("paper", "unknown")


@dataclass(frozen=True)
class Setting:
    """A setting.

    Attributes:
        value: what it is set to.
        known: whether this is what is known of the paper; else the paper's value was not at hand, and this is ours.
        note: where the value comes from.
    """

    value: Any
    known: bool
    note: str


@dataclass(frozen=True)
class Recipe:
    """A benchmark with its settings.

    Attributes:
        name: the file's.
        benchmark: a name in :data:`BENCHMARKS`.
        settings: by name: ``base``, ``seeds``, or a field of ``doran train``'s configuration with its section.
        methods: what each method sets otherwise, by the same names.
    """

    name: str
    benchmark: str
    settings: Mapping[str, Setting]
    methods: Mapping[str, Mapping[str, Any]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks of the benchmark."""
        return tuple(task for group in BENCHMARKS[self.benchmark].groups.values() for task in group)

    def value(self, name: str) -> Any:
        """A setting's value."""
        return self.settings[name].value

    def section(self, section: str, method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a section for a method; ``changes`` go before both."""
        values = {name: setting.value for name, setting in self.settings.items()}
        values |= {**self.methods[method], **changes}
        return {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}


def load_recipe(name: str) -> Recipe:
    """A recipe by its name in ``experiments/recipes``, or by its file's path.

    Raises:
        ExperimentError: no such recipe, or a key or value that is not known, named.
    """
    path = Path(name) if Path(name).suffix else RECIPES / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise ExperimentError(f"no recipe {name!r}; there are {known}") from error
    except yaml.YAMLError as error:
        raise ExperimentError(f"{path}: cannot be read as a recipe: {error}") from error
    if not isinstance(content, dict) or set(content) != _KEYS:
        got = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ExperimentError(f"{path}: expected the keys {sorted(_KEYS)}, got {got}")
    if content["benchmark"] not in BENCHMARKS:
        raise ExperimentError(f"{path}: unknown benchmark {content['benchmark']!r}; known are {sorted(BENCHMARKS)}")
    settings = {key: _setting(path, key, entry) for key, entry in content["settings"].items()}
    for needed in ("base", "seeds"):
        if needed not in settings:
            raise ExperimentError(f"{path}: missing setting {needed!r}")
    methods = {method: dict(changes or {}) for method, changes in content["methods"].items()}
    for method, changes in methods.items():
        for key in changes:
            _check_name(f"{path}: methods.{method}", key)
    return Recipe(path.stem, content["benchmark"], settings, methods)


def _setting(path: Path, name: str, entry: Any) -> Setting:
    _check_name(f"{path}: settings", name)
    if not isinstance(entry, dict) or set(entry) != {"value", "from", "note"} or entry["from"] not in _SOURCES:
        raise ExperimentError(f"{path}: {name}: expected value, from ({' or '.join(_SOURCES)}) and note, got {entry!r}")
    return Setting(entry["value"], entry["from"] == "paper", entry["note"])


def _check_name(where: str, name: str) -> None:
    section, dot, field = name.partition(".")
    if name not in ("base", "seeds") and not (section in _SECTIONS and dot and field):
        raise ExperimentError(f"{where}: unknown setting {name!r}: expected base, seeds or a field of {_SECTIONS}")
