"""A base layer whose weight cannot be read, as in quantized models: made here, so that it runs anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import disturb, logits, make_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from doran_core.errors import TargetError
from doran_hf import DoranConfig


class PackedLinear(nn.Module):
    """int8 rows with one scale each."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype) * self.scales.to(x.dtype))


def make_packed_llama() -> LlamaForCausalLM:
    model = make_llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = PackedLinear(layer.self_attn.q_proj)
        layer.self_attn.v_proj = PackedLinear(layer.self_attn.v_proj)
    return model


def test_starts_at_the_base_trains_and_comes_back(tmp_path: Path) -> None:
    base = make_packed_llama()
    expected = logits(base)
    model = get_peft_model(base, DoranConfig())
    assert (logits(model) - expected).abs().max() < 1e-5
    disturb(model)
    model.train()
    ids = torch.randint(3, 97, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"] is None
    assert torch.equal(logits(PeftModel.from_pretrained(make_packed_llama(), tmp_path)), adapted)


def test_merging_in_place_is_refused_with_a_way_out() -> None:
    model = get_peft_model(make_packed_llama(), DoranConfig())
    with pytest.raises(TargetError, match=r"PackedLinear.*doran merge"):
        model.merge_adapter()
