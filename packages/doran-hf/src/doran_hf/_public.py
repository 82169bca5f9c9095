"""DORAN among PEFT's methods: importing this registers it. The public names of the package."""

from __future__ import annotations

from doran_hf.callbacks import LayerMetricsCallback
from doran_hf.config import DoranConfig
from doran_hf.diagnostics import LayerState, factor_penalty, layer_states, tau_by_layer
from doran_hf.hotswap import hotswap_adapter
from doran_hf.layer import DoranLayer
from doran_hf.model import DoranModel
from doran_hf.precision import restore_start
from doran_hf.register import DoranPeftType, register
from doran_hf.weight_decay import exempt_from_decay

__all__ = [
    "DoranConfig",
    "DoranLayer",
    "DoranModel",
    "DoranPeftType",
    "LayerMetricsCallback",
    "LayerState",
    "exempt_from_decay",
    "factor_penalty",
    "hotswap_adapter",
    "layer_states",
    "register",
    "restore_start",
    "tau_by_layer",
]

register(DoranConfig, DoranModel)
