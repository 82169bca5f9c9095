"""What an adapter says of the base model that it is on, and the check of it on loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doran_core.checkpoint.fingerprint import fingerprint_weights
from doran_core.errors import BaseMismatchError
from doran_hf.config import DoranConfig
from doran_hf.layer import doran_layers

__all__ = ["base_fingerprint", "check_base", "module_kinds"]

_EXACT = (torch.float32, torch.bfloat16)
"""Dtypes in which a checkpoint's weights round to the same bf16 values as the checkpoint itself."""


def base_fingerprint(model: nn.Module, adapter_name: str) -> str | None:
    """Fingerprint of the weights that this adapter adapts.

    Returns:
        The fingerprint, or None where memory does not hold the checkpoint's values: half precision other than bf16,
        float64, quantized, sharded, or not loaded at all (meta device).
    """
    weights = []
    for layer in doran_layers(model, adapter_name):
        weight = layer.original_weight()
        if weight is None or weight.dtype not in _EXACT or weight.is_meta or not weight.numel():
            return None
        if type(weight.data) is not torch.Tensor:  # a DTensor, say, of which this process holds a part
            return None
        weights.append((layer.name, weight))
    return fingerprint_weights(weights) if weights else None


def module_kinds(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Kinds of the adapted layers that are not plain linear ones, by module name."""
    kinds = {layer.name: layer.view.kind for layer in doran_layers(model, adapter_name)}
    return {name: kind for name, kind in kinds.items() if kind not in ("linear", "opaque")}


def check_base(model: nn.Module, adapter_name: str, config: DoranConfig) -> None:
    """Refuse a base model other than the one that a loaded adapter was made for.

    Raises:
        BaseMismatchError: naming both fingerprints.
    """
    if config.base_fingerprint is None:
        return
    found = base_fingerprint(model, adapter_name)
    if found is not None and found != config.base_fingerprint:
        raise BaseMismatchError(
            f"adapter {adapter_name!r} was made for the base weights {config.base_fingerprint}"
            f"{_of(config.base_model_name_or_path)}, but the weights of this {type(model).__name__} are {found}. To "
            "load it all the same, set base_fingerprint and digest to null in its adapter_config.json"
        )


def _of(name: Any) -> str:
    return f" ({name})" if name else ""
