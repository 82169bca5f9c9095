"""DoRAN as a PEFT method. Importing this package registers it; the math is doran_core's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from doran_core.cli.loading import reading_flags

if TYPE_CHECKING or not reading_flags():
    from doran_hf.method import (
        DoranConfig,
        DoranLayer,
        DoranModel,
        DoranPeftType,
        LayerMetricsCallback,
        LayerState,
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
    "factor_penalty",
    "hotswap_adapter",
    "layer_states",
    "register",
    "restore_start",
    "tau_by_layer",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The version, and what was left out while the `doran` command read its flags: PEFT takes seconds to import."""
        if name == "__version__":
            from importlib.metadata import version

            return version("doran-hf")
        if name in __all__:
            from doran_hf import method

            return getattr(method, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
