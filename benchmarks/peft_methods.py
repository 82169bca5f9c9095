"""The methods that the benchmarks compare, each through get_peft_model on one set of base weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from doran_hf import DoranConfig

METHODS = ("LoRA", "DoRA", "DoRAN", "DoRAN static", "DoRAN as DoRA")
"""PEFT's LoRA and DoRA with adapters in the base's precision, PEFT's fastest; ours with adapters in float32."""

OURS: dict[str, dict[str, Any]] = {
    "DoRAN": {},
    "DoRAN static": {"factors": "static"},
    "DoRAN as DoRA": {"factors": "static", "tau_kind": "zero", "norm_grad": "detached"},
}
TARGETS: dict[str, Any] = {"all": "all-linear", "qv": ["q_proj", "v_proj"]}


def make_base(hidden: int, intermediate: int, layers: int, heads: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A Llama with random weights and a small vocabulary, frozen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype).requires_grad_(False)


def make_method(base: nn.Module, method: str, targets: str, rank: int, dropout: float = 0.0) -> PeftModel:
    """A model of its own with the base's weights, not copied, and a method's adapters."""
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in base.parameters()})
    if method in OURS:
        ours = {"rank": rank, "alpha": rank, "dropout": dropout, **OURS[method]}
        return get_peft_model(model, DoranConfig(target_modules=TARGETS[targets], **ours))
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=TARGETS[targets], use_dora=method == "DoRA"
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)
