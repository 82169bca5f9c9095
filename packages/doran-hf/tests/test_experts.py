"""Mixture-of-experts decoders: what is left out is said, and the defaults fit."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from doran_hf import DoranConfig
from doran_hf.expert_share import expert_share
from doran_hf.layer import doran_layers

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, moe_intermediate_size=48, head_dim=8, **SIZES))


BY_NAME = [r".*(q_proj|.experts.\d+.w1)", r".*(q_proj|experts\.\d+\.w1)", r".*(q_proj|gate_up_proj)"]


@pytest.mark.parametrize("targets", BY_NAME)
@pytest.mark.parametrize("way", ["config", "from_lora"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_by_name_among_modules_say_what_stays_unadapted(family: str, way: str, targets: str) -> None:
    model = make(family)
    share = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) / sum(
        p.numel() for p in model.parameters()
    )
    assert expert_share(model) == pytest.approx(share)
    options: dict[str, Any] = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    config = DoranConfig.from_lora(LoraConfig(r=2, **options)) if way == "from_lora" else DoranConfig(rank=2, **options)
    with pytest.warns(UserWarning, match=rf"{share:.0%} of its parameters are expert weights"):
        get_peft_model(model, config)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_defaults_adapt_attention_without_a_warning(family: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*expert weights.*")
        model = get_peft_model(make(family), DoranConfig(rank=2, task_type="CAUSAL_LM"))
    assert {layer.name.rpartition(".")[2] for layer in doran_layers(model)} == {"q_proj", "v_proj"}
