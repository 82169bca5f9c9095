"""Modules that start at random, such as poolers and heads, because the model's checkpoint lacks them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from doran_core.targets import shortened
from doran_hf.peft_internals import ignored_if_missing, was_loaded

__all__ = ["modules_of", "not_in", "random_parameters", "warn_random_start"]


def random_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that a loaded model's checkpoint lacks; empty if the model was not loaded.

    A parameter that was put into the model after loading counts as well.
    """
    parameters = dict(model.named_parameters())
    if not any(was_loaded(parameter) for parameter in parameters.values()):
        return []
    return [
        name
        for name, parameter in parameters.items()
        if not was_loaded(parameter) and not parameter.is_meta and not ignored_if_missing(model, name)
    ]


def modules_of(model: nn.Module, names: Collection[str]) -> tuple[list[str], list[str]]:
    """The largest modules that consist of these parameters only.

    Args:
        model: the model.
        names: of parameters.

    Returns:
        ``(names of modules, names of parameters in none of them)``, in the model's order.
    """
    found: list[str] = []
    for place, module in model.named_modules():
        own = [f"{place}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)]
        if place and own and all(name in names for name in own) and not _is_inside(place, found):
            found.append(place)
    return found, [name for name, _ in model.named_parameters() if name in names and not _is_inside(name, found)]


def not_in(model: nn.Module, names: Iterable[str], modules_to_save: Sequence[str]) -> list[str]:
    """The parameters that belong to none of the ``modules_to_save``, which PEFT matches against the ends of names."""
    saved = tuple(modules_to_save)
    places = [name for name, _ in model.named_modules() if saved and name.endswith(saved)]
    return [name for name in names if not _is_inside(name, places)]


def warn_random_start(model: nn.Module, modules_to_save: Iterable[str] | None) -> None:
    """Warn about parameters that start at random and are not in ``modules_to_save``.

    Args:
        model: before it is adapted.
        modules_to_save: as in PEFT, endings of names.
    """
    saved = list(modules_to_save or ())
    lost = not_in(model, random_parameters(model), saved)
    if not lost:
        return
    modules, others = modules_of(model, lost)
    advice = f"add them: modules_to_save={[*saved, *modules]}" if not others else "load a checkpoint that has them"
    warnings.warn(
        f"the checkpoint of this {type(model).__name__} lacks {shortened(modules + others)}: they start at random, and "
        f"the adapter neither trains them nor saves them (except resized embeddings); {advice}",
        stacklevel=5,
    )


def _is_inside(name: str, places: Collection[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)
