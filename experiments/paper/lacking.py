"""What is missing on this machine to run a recipe: packages, base model, examples; and what the paper leaves open."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from experiments.paper.benchmark import Lack
from experiments.paper.recipe import BENCHMARKS, Recipe

__all__ = ["lacks", "told"]

PACKAGES = ("doran_hf", "transformers", "peft", "accelerate", "datasets", "pyarrow", "PIL")


def lacks(recipe: Recipe, folder: Path, base: str, tasks: Sequence[str]) -> list[Lack]:
    """Everything that a run of these tasks lacks.

    Args:
        recipe: the recipe.
        folder: of the examples.
        base: directory or hub name of the base model.
        tasks: names.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    found = [Lack(f"the Python package {name} is not installed: pip install 'doran-hf[train]'") for name in missing]
    if not missing:
        found += _base_lacks(recipe, base)
    if not folder.is_dir():
        return [*found, Lack(f"no folder {folder} of examples; what belongs there is in experiments/paper")]
    return [*found, *BENCHMARKS[recipe.benchmark].lacks(folder, tuple(tasks))]


def _base_lacks(recipe: Recipe, base: str) -> list[Lack]:
    """What the base model lacks; its weights are looked for, not read."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    from doran_core.errors import CheckpointError
    from doran_hf.train.recipe import load_part

    try:
        load_part("configuration", AutoConfig, base)
    except CheckpointError as error:
        return [Lack(str(error))]
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    if not any(cached_file(base, name, _raise_exceptions_for_missing_entries=False) for name in names):
        return [Lack(f"base: {base!r} has a configuration but none of {', '.join(names)}")]
    return []


def told(recipe: Recipe, found: Sequence[Lack]) -> str:
    """All of it in lines."""
    missing = [lack.text for lack in found if not lack.partial]
    partial = [lack.text for lack in found if lack.partial]
    unknown = [f"{name} = {s.value}: {s.note}" for name, s in recipe.settings.items() if not s.known]
    parts = [("missing", missing), ("not as in the benchmark", partial), ("the paper's value is not known", unknown)]
    lines = []
    for title, texts in parts:
        lines += [f"{title}: {len(texts) or 'nothing'}", *(f"  {text}" for text in texts)]
    return "\n".join(lines)
