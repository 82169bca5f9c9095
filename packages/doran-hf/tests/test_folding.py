"""An adapter in training, written as an engine serves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import disturb, load_quantized, make_llama
from peft import get_peft_model
from test_quantized import PackedLinear, make_packed_llama

from doran_core.adapter import read_folded
from doran_core.convert import fold_adapter
from doran_core.errors import ConfigError, NonFiniteError
from doran_hf import DoranConfig, save_folded
from doran_hf.layer import doran_layers


def test_the_same_as_folding_the_saved_adapter_against_the_base_s_files(tmp_path: Path) -> None:
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    config = DoranConfig(rank=4, target_modules="all-linear", dropout=0.5, experts=True, expert_mask="element")
    model = get_peft_model(base, config).train()
    disturb(model)
    model.save_pretrained(tmp_path / "trainable")
    expected = fold_adapter(tmp_path / "trainable", tmp_path / "base")
    found = read_folded(save_folded(model, tmp_path / "folded"))
    assert found.base_fingerprint == expected.base_fingerprint is not None
    assert found.ties == expected.ties
    assert found.modules.keys() == expected.modules.keys()
    for name, module in expected.modules.items():
        for part in ("A", "B", "scale", "magnitude"):
            assert torch.equal(getattr(found.modules[name], part), getattr(module, part)), (name, part)


def test_a_second_version_replaces_the_first_and_training_goes_on(tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), DoranConfig(rank=4)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    written = []
    for _ in range(2):
        ids = torch.randint(3, 97, (2, 6))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        written.append(read_folded(save_folded(model, tmp_path / "policy")))
    assert model.training
    assert not any(layer.merged for layer in doran_layers(model))
    assert all(not torch.equal(m.B, written[1].modules[name].B) for name, m in written[0].modules.items())


def test_a_quantized_base_gives_the_scale_of_training(tmp_path: Path) -> None:
    model = get_peft_model(make_packed_llama(), DoranConfig(rank=4))
    disturb(model)
    found = read_folded(save_folded(model, tmp_path / "policy"))
    assert found.base_fingerprint is None
    for layer in doran_layers(model):
        packed, adapter, module = layer.base_layer, layer.adapter("default"), found.modules[layer.name]
        assert isinstance(packed, PackedLinear)
        weight = packed.weight.double() * packed.scales.double()
        norm = (weight + module.B.double() @ module.A.double()).norm(dim=1)
        scale = adapter.magnitude.double() / (norm + adapter.tau.value().double())
        torch.testing.assert_close(module.scale.double(), scale, rtol=1e-5, atol=0)
        torch.testing.assert_close(module.magnitude.double(), scale * norm, rtol=1e-5, atol=0)


def test_four_bits_of_bitsandbytes(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(load_quantized(tmp_path / "base", 4), DoranConfig(rank=4)).eval()
    disturb(model)
    found = read_folded(save_folded(model, tmp_path / "policy"))
    for layer in doran_layers(model):
        module = found.modules[layer.name]
        x = torch.randn(3, layer.in_features)
        with torch.no_grad():
            served = module.scale * (layer.base_layer(x) + x @ module.A.T @ module.B.T)
            torch.testing.assert_close(served, layer(x), rtol=1e-4, atol=1e-5)


def test_what_an_engine_cannot_take_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    for options, message in (
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: trains more than the adapted layers"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "engine's requests adapt linear layers alone"),
        ({}, "no DoRAN adapter 'other'"),
    ):
        model = get_peft_model(make_llama(), DoranConfig(rank=4, **options))
        with pytest.raises(ConfigError, match=message):
            save_folded(model, target, None if options else "other")
    model = get_peft_model(make_llama(), DoranConfig(rank=4))
    next(doran_layers(model)).adapter("default").magnitude.data[0] = float("nan")
    with pytest.raises(NonFiniteError):
        save_folded(model, target)
    assert not target.exists()
