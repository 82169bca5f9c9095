"""Defaults of options that the user leaves open: target modules (query and value, as in the paper) and head_dim."""

from __future__ import annotations

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from doran_core.errors import ConfigError
from doran_hf.config import DoranConfig

__all__ = ["DEFAULT_TARGETS", "fill_head_dim"]

_OURS: dict[str, list[str]] = {
    # PEFT's LoRA defaults for these families include more than query and value.
    "btlm": ["c_attn"],
    "nemotron_h": ["q_proj", "v_proj"],
    "phi": ["q_proj", "v_proj"],
    "rwkv": ["receptance", "value"],
    "rwkv7": ["r_proj", "v_proj"],
    # Mixture-of-experts decoders: attention only. DeepSeek may compress queries and values.
    **{key: ["q_proj", "q_b_proj", "kv_b_proj"] for key in ["deepseek_v2", "deepseek_v3"]},
    **{
        key: ["q_proj", "v_proj"]
        for key in ["ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"]
    },
    # Families without a LoRA default in PEFT. Vision models have either spelling, by their age.
    "dinov2": ["q_proj", "v_proj", "query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "vit": ["q_proj", "v_proj", "query", "value"],
}

DEFAULT_TARGETS: dict[str, str | list[str]] = {**TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, **_OURS}
"""By ``model_type``: name endings, or one regex, of the query and value projections, or of the fused projection. A
model need not have all names of a list."""


def fill_head_dim(config: DoranConfig, model: nn.Module) -> None:
    """Set head_dim from the model's configuration if tau per head needs it.

    Raises:
        ConfigError: the model's configuration has no head size.
    """
    if config.tau_granularity != "head" or config.head_dim is not None:
        return
    facts = getattr(model, "config", None)
    size = getattr(facts, "head_dim", None)
    hidden, heads = getattr(facts, "hidden_size", None), getattr(facts, "num_attention_heads", None)
    if isinstance(size, int):
        config.head_dim = size
    elif isinstance(hidden, int) and isinstance(heads, int) and heads:
        config.head_dim = hidden // heads
    else:
        raise ConfigError(
            "DoranConfig.tau_granularity='head' needs head_dim: "
            f"{type(model).__name__} has no configuration to take it from"
        )
