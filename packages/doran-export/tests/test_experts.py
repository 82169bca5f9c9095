"""Mixtures of experts: the graph gathers each token's experts, and computes what the merged model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import TEXT, saved
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from doran_core import DoranConfig
from doran_core.adapter import TrainableAdapter, write_trainable
from doran_core.errors import AdapterFormatError
from doran_export import OnnxRunner, export

EXPERTS, LAYERS, INNER, RANK = 4, 2, 48, 2


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        **TEXT,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": EXPERTS,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
    }
    model: PreTrainedModel
    if family == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = transformers.GptOssConfig(**sizes, head_dim=8, rope_parameters=rope)
        model = transformers.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "experts" in name or "gate" in name or "router" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write_adapter(folder: Path) -> Path:
    """Of Mixtral's down projections."""
    draw = torch.Generator().manual_seed(3)
    width = TEXT["hidden_size"]
    modules, stored = {}, {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        modules[name] = {
            "magnitude": 1.0 + torch.rand(EXPERTS, width, generator=draw),
            "tau.raw": torch.zeros(1),
            "factors.A": 0.3 * torch.randn(EXPERTS, RANK, INNER, generator=draw),
            "factors.B": 0.3 * torch.randn(EXPERTS, width, RANK, generator=draw),
        }
        stored[name] = [f"model.layers.{layer}.block_sparse_moe.experts.{{}}.w2.weight"]
    config = DoranConfig(rank=RANK, alpha=RANK, factors="static", target_modules=[])
    write_trainable(TrainableAdapter(config, modules, stored_experts=stored, ties={}), folder)
    return folder


def merged(weight: torch.Tensor, adapter: Path, layer: int) -> torch.Tensor:
    """W' of every expert, from the formula, in float64."""
    prefix = f"base_model.model.model.layers.{layer}.mlp.experts.down_proj.doran_adapter."
    tensors = {
        key.removeprefix(prefix): t.double() for key, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    V = weight.double() + tensors["factors.B"] @ tensors["factors.A"]
    norm = V.square().sum(-1).sqrt()
    return (tensors["magnitude"] / (norm + nn.functional.softplus(tensors["tau.raw"])))[..., None] * V


def test_an_adapter_of_experts(tmp_path: Path) -> None:
    base, adapter = saved(tiny("mixtral"), tmp_path / "base"), write_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterFormatError, match=r"stacked expert weights .*down_proj"):
        export(out=tmp_path / "separate", base=base, adapters={"a": adapter})
    report = export(out=tmp_path / "out", base=base, adapter=adapter, exporter="torch")
    assert report.architecture == "MixtralForCausalLM"
    tokens = [[3, 4, 5, 6, 7]]
    found = OnnxRunner(tmp_path / "out").run({"input_ids": tokens})["logits"]
    model: Any = tiny("mixtral")
    with torch.inference_mode():
        before = model(torch.tensor(tokens)).logits.numpy()
        for layer, block in enumerate(model.model.layers):
            weight = block.mlp.experts.down_proj
            weight.copy_(merged(weight, adapter, layer))
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected - before).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_experts_with_transposed_weights_and_biases(tmp_path: Path) -> None:
    report = export(saved(tiny("gpt_oss"), tmp_path / "model"), tmp_path / "out", exporter="torch")
    assert report.architecture == "GptOssForCausalLM"
    assert max(value for check in report.proof.checks for value in check.max_difference.values()) < 1e-4
