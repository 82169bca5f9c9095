"""Running statistics of normalisation layers: training changes them, and an adapter does not save them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from doran_core.checkpoint.ties import base_parameter

__all__ = ["forget_statistics", "keep_statistics", "warn_moved_statistics"]

_KEPT = "doran_running_mean"
"""Attribute of a normalisation layer: its running mean when the model was adapted."""


def keep_statistics(model: nn.Module) -> None:
    """Remember a model's running means when the model is adapted for the first time."""
    for _, module, mean in _tracking(model):
        vars(module).setdefault(_KEPT, mean.detach().clone())


def forget_statistics(model: nn.Module) -> None:
    """Undo :func:`keep_statistics`."""
    for module in model.modules():
        vars(module).pop(_KEPT, None)


def warn_moved_statistics(model: nn.Module, saved: Iterable[str] = ()) -> None:
    """Name, in one warning, the layers whose running statistics have moved and are not saved with the adapter.

    Args:
        model: the base model, adapted.
        saved: names of modules that are saved in full.
    """
    inside = tuple(f"{name}." for name in saved)
    moved = [
        name
        for name, module, mean in _tracking(model)
        if (kept := vars(module).get(_KEPT)) is not None
        and not f"{name}.".startswith(inside)
        and not torch.equal(kept.to(mean), mean)
    ]
    if moved:
        shown = ", ".join(moved[:3]) + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
        warnings.warn(
            f"the running statistics of {shown} have moved since the model was adapted, and the adapter does not save "
            "them: loaded, or merged from its files, it computes something else. Keep these layers in eval mode while "
            "training (their eval() after model.train()), or name them in modules_to_save",
            stacklevel=3,
        )


def _tracking(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The layers with running statistics, by the base model's names; without copies that are trained in full."""
    for name, module in model.named_modules():
        # getattr would reach through PEFT's wrappers.
        mean = dict(module.named_buffers(recurse=False)).get("running_mean")
        plain = base_parameter(f"{name}.running_mean")
        if plain is not None and mean is not None and not mean.is_meta:
            yield plain.removesuffix(".running_mean"), module, mean
