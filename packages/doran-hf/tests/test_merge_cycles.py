"""Merging and unmerging, as a reinforcement learning loop does at each step, leaves the base's bits alone."""

from __future__ import annotations

import torch
from conftest import disturb, make_llama
from peft import LoraConfig, get_peft_model

from doran_hf import DoranConfig

CYCLES = 200


def drift(config: LoraConfig | DoranConfig, dtype: torch.dtype) -> float:
    """The largest change of a base weight after 200 cycles, each with other adapter values."""
    model = get_peft_model(make_llama(dtype), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer.weight" in name}
    for cycle in range(CYCLES):
        if isinstance(config, DoranConfig):
            disturb(model, seed=cycle, size=0.01)
        else:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
        model.merge_adapter()
        model.unmerge_adapter()
    after = dict(model.named_parameters())
    return max(float((after[name] - weight).abs().max()) for name, weight in before.items())


def test_the_base_is_the_same_bits_and_lora_s_drifts() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert drift(DoranConfig(rank=4, task_type="CAUSAL_LM"), dtype) == 0.0
    assert drift(LoraConfig(r=4, task_type="CAUSAL_LM"), torch.bfloat16) > 1e-4
