"""The merge of a real model in two shards is the float64 merge in memory, rounded to the same dtype."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from doran_core import DoranConfig, adapt
from doran_core.merge import merge_checkpoint

sys.path.append(str(Path(__file__).parents[3] / "tests"))

from smollm2 import load_model


@pytest.fixture(scope="module")
def smollm2():
    return load_model()


def save(model, folder, dtype):
    """The model in two shards of this dtype."""
    model.to(dtype).save_pretrained(folder, max_shard_size="300MB" if dtype == torch.float32 else "150MB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def header(path):
    """The header of a safetensors file: names, dtypes, shapes and places of its tensors."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@torch.no_grad()
def merge_in_memory(model, handle):
    """W' = m V / (||V|| + tau) in float64 from the formula, for every adapted layer; the model is changed."""
    merged = {}
    for name, layer in handle.layers.items():
        adapter, weight = layer.doran_adapter, layer.base_layer.weight
        A, B = (factor.double() for factor in adapter.factor_pair())
        V = weight.double() + adapter.scaling * (B @ A)
        n = V.pow(2).sum(1).sqrt()
        merged[name] = (adapter.magnitude.double() / (n + adapter.tau.value().double()))[:, None] * V
    handle.remove()
    for name, weight in merged.items():
        model.get_submodule(name).weight.copy_(weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_shards_as_save_pretrained_writes_them(smollm2, tmp_path, dtype):
    model = copy.deepcopy(smollm2)
    base = save(model, tmp_path / "base", dtype)
    handle = adapt(model, DoranConfig(rank=16, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if "w2_B" in name or "magnitude" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    handle.save(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    expected = save(merge_in_memory(model, handle), tmp_path / "expected", dtype)
    files = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == files
    for name in files:
        one, other = tmp_path / "merged" / name, expected / name
        if not name.endswith(".safetensors"):
            assert json.loads(one.read_text()) == json.loads(other.read_text()), name
            continue
        assert header(one) == header(other), name
        expected_tensors = load_file(other)
        for tensor, value in load_file(one).items():
            # The order of a sum in float64 decides how a number halfway between two of float32 is rounded.
            differ = value != expected_tensors[tensor]
            assert differ.sum() <= value.numel() / 1e4, tensor
            torch.testing.assert_close(value, expected_tensors[tensor], rtol=torch.finfo(value.dtype).eps, atol=0)
