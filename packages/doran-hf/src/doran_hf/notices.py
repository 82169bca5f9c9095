"""Warnings about a model, given before its adapters are merged or saved."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from doran_core.layers.statistics import warn_moved_statistics
from doran_core.layers.uncalled import warn_uncalled
from doran_hf.base_check import base_model
from doran_hf.layer import doran_layers

__all__ = ["before_merging", "before_saving"]


def before_merging(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Name the adapted layers that no pass has called."""
    _uncalled(model, adapter_names, "merging still changes their weights")


def before_saving(model: nn.Module, adapter_name: str) -> None:
    """Name the adapted layers that no pass has called, and running statistics that are not saved."""
    _uncalled(model, [adapter_name], "their adapters are saved as they are")
    warn_moved_statistics(base_model(model))


def _uncalled(model: nn.Module, adapter_names: Sequence[str], doing: str) -> None:
    for name in adapter_names:
        warn_uncalled((layer.adapter(name) for layer in doran_layers(model, name)), doing)
