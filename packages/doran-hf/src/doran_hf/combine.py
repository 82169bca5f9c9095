"""Combines several adapters into one whose change is exactly the weighted sum of their changes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from doran_core.errors import ConfigError, DoranError, NonFiniteError
from doran_core.method.factors import StaticFactors
from doran_hf.config import DoranConfig
from doran_hf.layer import DoranLayer, check_adapter, doran_layers

__all__ = ["add_weighted_adapter"]

_SMALLEST_SCALE = 1e-3
"""Least combined scale of a row. Below it W0's row nearly vanishes, and dividing B's row by it loses accuracy."""


@torch.no_grad()
def add_weighted_adapter(
    tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """Add an adapter whose change to each weight is the weighted sum of the changes of others.

    With ``W_i = c_i (W0 + g_i B_i A_i)``, the sum ``W0 + sum w_i (W_i - W0)`` is ``C (W0 + B A)`` with
    ``C = 1 + sum w_i (c_i - 1)``. A concatenates the rows of the A_i, and B the columns of the ``w_i c_i g_i B_i / C``.
    The result is a DoRAN adapter with static factors, without tau; its rank is the sum of the ranks.

    Args:
        tuner: the model's tuner.
        adapters: names of the adapters to combine.
        weights: one for each; any sign.
        adapter_name: name of the new adapter, which is inactive and untrained.
        combination_type: "cat", PEFT's name for this.

    Raises:
        ConfigError: an unknown or repeated name, another number of weights, a name that is taken, another type of
            combination, or adapters that train more than their layers.
        DoranError: adapters are merged.
        NonFiniteError: a combined scale is 0 or nearly 0; no adapter is added.
    """
    _check(tuner, adapters, weights, adapter_name, combination_type)
    shares = dict(zip(adapters, weights, strict=True))
    combined = {
        layer.name: _combine(layer, shares)
        for layer in doran_layers(tuner.model)
        if any(name in layer.doran_adapter for name in shares)
    }
    tuner.peft_config[adapter_name] = _config_for(tuner.peft_config[adapters[0]], combined)
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        del tuner.peft_config[adapter_name]
        raise
    for layer in doran_layers(tuner.model, adapter_name):
        _fill(layer, adapter_name, *combined[layer.name])


def _check(
    tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    if combination_type != "cat":
        raise ConfigError(f"combination_type: expected 'cat', the exact sum, got {combination_type!r}")
    if not adapters or len(set(adapters)) != len(adapters) or len(weights) != len(adapters):
        raise ConfigError(
            f"adapters={list(adapters)!r}, weights={list(weights)!r}: expected names, each once, and a weight for each"
        )
    if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights={list(weights)!r}: expected numbers")
    if merged := next((layer for layer in doran_layers(tuner.model) if layer.merged), None):
        raise DoranError(
            f"{merged.merged_adapters} are merged: unmerge them (unmerge_adapter) before combining adapters"
        )
    if adapter_name in tuner.peft_config:
        raise ConfigError(f"adapter_name: there is an adapter {adapter_name!r} already; delete it or name another")
    for name in adapters:
        check_adapter(tuner.model, name)
        config = tuner.peft_config[name]
        if config.target_parameters:
            raise ConfigError(
                f"the adapter {name!r} adapts expert weights (target_parameters), which cannot be combined; activate "
                "several adapters at once, or merge them"
            )
        for option in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, option):
                raise ConfigError(f"the adapter {name!r} has {option}: whole parameters cannot be combined")
        if config.bias != "none":
            raise ConfigError(f"the adapter {name!r} trains biases (bias={config.bias!r}): they cannot be combined")


def _combine(layer: DoranLayer, shares: Mapping[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    """``(C [d_out], A [r, d_in], B [d_out, r])`` of one layer."""
    view, scale = layer.view, torch.zeros(layer.out_features, device=layer.view.device)
    parts = []
    for name, weight in shares.items():
        if name not in layer.doran_adapter:
            continue
        adapter = layer.adapter(name)
        with adapter.inference_mode_of_method():
            c, A, scaled_B = adapter.scale_and_factors(view)
        scale = scale + weight * (c - 1)
        parts.append((A, weight * scaled_B))
    scale = scale + 1
    smallest = float(scale.abs().min())
    if not smallest > _SMALLEST_SCALE:
        raise NonFiniteError(
            f"{layer.name}: with these weights the base weight gets the factor {smallest:.2g} in a row, so no "
            "DoRAN adapter computes the sum; take other weights, or merge the adapters"
        )
    return scale, torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1) / scale[:, None]


def _config_for(like: DoranConfig, combined: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> DoranConfig:
    ranks = {name: A.shape[0] for name, (_, A, _) in combined.items()}
    most = max(ranks.values())
    patterns = {re.escape(name): rank for name, rank in ranks.items() if rank != most}
    return DoranConfig(
        rank=most,
        alpha=float(most),
        rank_pattern=patterns,
        alpha_pattern={name: float(rank) for name, rank in patterns.items()},
        target_modules=sorted(ranks),
        factors="static",
        tau_kind="zero",
        task_type=like.task_type,
        base_model_name_or_path=like.base_model_name_or_path,
        inference_mode=True,
    )


def _fill(layer: DoranLayer, adapter_name: str, scale: Tensor, A: Tensor, B: Tensor) -> None:
    adapter = layer.adapter(adapter_name)
    factors: Any = adapter.factors
    assert isinstance(factors, StaticFactors)
    factors.A.copy_(A)
    factors.B.copy_(B)
    adapter.magnitude.copy_(scale * adapter.norm(layer.view, factors.A, factors.B))
