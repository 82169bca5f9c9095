"""Recognises an engine in merged mode, and refuses options that do not combine with the mode."""

from __future__ import annotations

from typing import Any

from doran_core.errors import DoranError

__all__ = ["MERGED", "MODE_KEY", "is_merged", "merged_options"]

MODE_KEY = "doran_mode"
"""Key of vLLM's `additional_config`, which reaches every process of an engine."""
MERGED = "merged"


def merged_options() -> dict[str, str]:
    """The `additional_config` of an engine in merged mode."""
    return {MODE_KEY: MERGED}


def is_merged(vllm_config: Any) -> bool:
    """Whether `vllm_config` is that of an engine in merged mode.

    Raises:
        DoranError: the mode is unknown, or does not combine with the engine's other options.
    """
    options = getattr(vllm_config, "additional_config", None)
    mode = options.get(MODE_KEY) if isinstance(options, dict) else None
    if mode is None:
        return False
    if mode != MERGED:
        raise DoranError(f"additional_config: {MODE_KEY}={mode!r}, expected {MERGED!r} or nothing (mixed serving)")
    if vllm_config.lora_config is not None:
        raise DoranError("merged mode swaps the weights themselves: leave out enable_lora (--enable-lora)")
    if vllm_config.model_config.quantization is not None:
        raise DoranError(
            f"merged mode writes adapted weights in place, which a base quantized by "
            f"{vllm_config.model_config.quantization!r} cannot hold; use mixed mode"
        )
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise DoranError("merged mode does not serve data-parallel engines; start one server for each instead")
    return True
