"""Quantized bases: bitsandbytes in 8 and 4 bits on the CPU, and a layer made here whose weight cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import disturb, load_quantized, logits, make_llama
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from doran_core.errors import TargetError
from doran_hf import DoranConfig
from doran_hf.layer import doran_layers


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


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("prepared", [False, True])
def test_bitsandbytes(bits: int, prepared: bool, saved_base: Path, tmp_path: Path) -> None:
    """On bitsandbytes' CPU backend: the start is the quantized base, training moves it, a saved adapter comes back."""
    base = load_quantized(saved_base, bits)
    expected = logits(base)
    if prepared:
        base = prepare_model_for_kbit_training(base)
    model = get_peft_model(base, DoranConfig(rank=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    kinds = {layer.view.kind for layer in doran_layers(model)}
    assert kinds == {"opaque"}
    assert (logits(model) - expected).abs().max() < 2e-3 * expected.abs().max()
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    base = load_quantized(saved_base, bits)
    if prepared:  # it casts norms and head to float32
        base = prepare_model_for_kbit_training(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(loaded), adapted, atol=1e-4, rtol=1e-4)


def test_the_norm_of_a_quantized_layer_is_that_of_its_weight(saved_base: Path) -> None:
    model = get_peft_model(load_quantized(saved_base, 4), DoranConfig(rank=4, target_modules="all-linear"))
    disturb(model)
    for layer in doran_layers(model):
        adapter, base = layer.adapter("default"), layer.get_base_layer()
        with torch.no_grad():
            A, B = adapter.factor_pair()
            weight = base(torch.eye(base.in_features)).T - (0 if base.bias is None else base.bias[:, None])
            expected = (weight.double() + adapter.scaling * B.double() @ A.double()).norm(dim=1)
            torch.testing.assert_close(adapter.norm(layer.view, A, B).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_four_bits_packed_into_floating_numbers(storage: torch.dtype) -> None:
    """As FSDP with QLoRA asks for: the packed weight is no matrix of the layer's shape."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_storage=storage)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_storage=storage)
    model = nn.Sequential(packed.to("cpu"))
    x = torch.randn(3, 64)
    expected = model(x)
    adapted = get_peft_model(model, DoranConfig(rank=4, target_modules=["0"]))
    torch.testing.assert_close(adapted(x), expected)
    assert {layer.view.kind for layer in doran_layers(adapted)} == {"opaque"}
