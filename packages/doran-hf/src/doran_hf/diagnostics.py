"""What the adapters of a model are doing, as plain functions."""

from __future__ import annotations

from torch import Tensor, nn

from doran_core.layers import DoranAdapter
from doran_hf.layer import doran_layers

__all__ = ["factor_penalty", "tau_by_layer"]


def _adapters(model: nn.Module, adapter_name: str | None) -> list[tuple[str, DoranAdapter]]:
    """Adapted layers' names and adapters: of one name, or the active ones."""
    found = []
    for layer in doran_layers(model, adapter_name):
        names = [adapter_name] if adapter_name is not None else layer.active_adapters
        found += [(layer.name, layer.adapter(name)) for name in names if name in layer.doran_adapter]
    return found


def tau_by_layer(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """tau of every adapted layer, as inference uses it.

    Args:
        model: with DoRAN adapters, wrapped by PEFT or not.
        adapter_name: which adapter; None for the active one.

    Returns:
        For each module name of the base model ``[1]`` or, per head or row, ``[d_out]``: detached copies on the CPU.
    """
    return {name: adapter.tau.value().detach().cpu().clone() for name, adapter in _adapters(model, adapter_name)}


def factor_penalty(model: nn.Module, adapter_name: str | None = None) -> Tensor | None:
    """The penalty on the factors, ``DoranConfig.factor_penalty`` included: a scalar to add to the loss.

    Models from transformers add it to the loss that they return by themselves; this is for your own loss.

    Args:
        model: with DoRAN adapters, wrapped by PEFT or not.
        adapter_name: which adapter; None for the active ones.

    Returns:
        The mean over the adapted layers, or None if no configuration asks for a penalty.
    """
    penalties = [a.penalty() for _, a in _adapters(model, adapter_name) if a.config.factor_penalty > 0.0]
    if not penalties:
        return None
    total = penalties[0]
    for penalty in penalties[1:]:
        total = total + penalty.to(total.device)
    return total / len(penalties)
