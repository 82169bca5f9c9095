"""DoRAN as a PEFT method. Importing this package registers it; the math is doran_core's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doran_core.cli.command import reading_flags
from doran_core.support.lazy import lazy_names

if TYPE_CHECKING or not reading_flags():
    from doran_hf._public import (
        DoranConfig,
        DoranLayer,
        DoranModel,
        DoranPeftType,
        LayerMetricsCallback,
        LayerState,
        exempt_from_decay,
        factor_penalty,
        hotswap_adapter,
        layer_states,
        register,
        restore_start,
        tau_by_layer,
    )

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

if not TYPE_CHECKING:
    # What was left out while the `doran` command read its flags: PEFT takes seconds to import.
    __getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(__all__, "_public"), distribution="doran-hf")
