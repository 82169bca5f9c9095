"""Adapters of stacked expert weights from files: `doran merge` of both layouts, the fingerprint, what is refused."""

import json

import pytest
import torch
from moe_bases import EXPERTS, FAMILIES, make_moe, tokens
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from doran_core import load
from doran_core.adapter import read_adapter
from doran_core.checkpoint.binding import bind
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.convert import fold_adapter
from doran_core.diagnostics.inspect import inspect_adapter
from doran_core.errors import AdapterFormatError, BaseMismatchError, CheckpointError, TargetError
from doran_core.merge import merge_checkpoint
from doran_core.merge.tensors import base_tensors, merged_tensors
from doran_hf import DoranConfig

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def trained(family, **options):
    fields = {"rank": 3, "target_modules": [], "target_parameters": TARGETS, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(make_moe(family), DoranConfig(**fields))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save_base(family, directory, *, fused):
    """As save_pretrained stores it, or every parameter under its name in the model: stacks in one tensor."""
    model = make_moe(family)
    model.save_pretrained(directory)
    if fused:
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{}, {"factors": "static", "tau_granularity": "row", "target_modules": ["q_proj"]}])
def test_doran_merge_equals_the_unmerged_model(family, fused, options, tmp_path):
    model = trained(family, **options)
    model.save_pretrained(tmp_path / "adapter")
    base = save_base(family, tmp_path / "base", fused=fused)
    single = any(".experts.0." in key for key in load_file(base / "model.safetensors"))
    assert single == (not fused and family != "gpt_oss")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    per_layer = 2 if fused or family == "gpt_oss" else 3 * EXPERTS
    assert len(changed) == 2 * (per_layer + bool(options.get("target_modules")))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        expected = model(tokens()).logits
        torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        assert (expected - make_moe(family)(tokens()).logits).abs().max() > 1e-2
        in_memory = model.merge_and_unload()
        for name, parameter in in_memory.named_parameters():
            torch.testing.assert_close(dict(merged.named_parameters())[name], parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_tensors_merged_in_memory_are_those_of_the_merged_checkpoint(family, fused, tmp_path):
    trained(family, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    base = save_base(family, tmp_path / "base", fused=fused)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    modules = bind(read_adapter(tmp_path / "adapter"), Checkpoint(base), tmp_path / "adapter").modules
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    threads = torch.get_num_threads()
    for found, written in ((dict(base_tensors(modules)), before), (dict(merged_tensors(modules)), after)):
        assert found.keys() == {key for key in before if not torch.equal(before[key], after[key])}
        assert all(torch.equal(tensor, written[key]) for key, tensor in found.items())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("fused", [False, True])
def test_another_base_is_refused(family, fused, tmp_path):
    trained(family).save_pretrained(tmp_path / "adapter")
    base = save_base(family, tmp_path / "base", fused=fused)
    tensors = load_file(base / "model.safetensors")
    key = next(key for key in tensors if "experts" in key and tensors[key].dim() >= 2 and "layers.1" in key)
    tensors[key] = tensors[key] + 0.5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatchError):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")


def test_two_adapters_and_a_weight(tmp_path):
    model = trained("mixtral")
    model.save_pretrained(tmp_path / "adapter")
    base = save_base("mixtral", tmp_path / "base", fused=True)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "whole")
    merge_checkpoint(base, [(tmp_path / "adapter", 0.5)], tmp_path / "half", dtype=torch.float64)
    files = (load_file(path / "model.safetensors") for path in (base, tmp_path / "whole", tmp_path / "half"))
    before, whole, half = (file["model.layers.0.mlp.experts.down_proj"].double() for file in files)
    torch.testing.assert_close(half, (before + whole) / 2, rtol=1e-6, atol=1e-6)


def test_inspect_measures_each_expert(tmp_path):
    trained("qwen3_moe").save_pretrained(tmp_path / "adapter")
    base = save_base("qwen3_moe", tmp_path / "base", fused=True)
    for report in (inspect_adapter(tmp_path / "adapter"), inspect_adapter(tmp_path / "adapter", base)):
        names = [layer.name for layer in report.layers]
        assert names[:2] == ["model.layers.0.mlp.experts.down_proj[0]", "model.layers.0.mlp.experts.down_proj[1]"]
        assert len(names) == 2 * 2 * EXPERTS
    assert all(layer.change is not None and layer.change > 0 for layer in report.layers)


def test_what_files_cannot_hold_or_load_is_refused_by_name(tmp_path):
    trained("mixtral").save_pretrained(tmp_path / "adapter")
    base = save_base("mixtral", tmp_path / "base", fused=False)
    with pytest.raises(AdapterFormatError, match=r"stacked expert weights model\.layers\.0\.mlp\.experts"):
        fold_adapter(tmp_path / "adapter", base)
    with pytest.raises(TargetError, match="load it with doran-hf"):
        load(make_moe("mixtral"), tmp_path / "adapter")


def test_a_checkpoint_with_other_experts_is_refused(tmp_path):
    trained("mixtral").save_pretrained(tmp_path / "adapter")
    base = save_base("mixtral", tmp_path / "base", fused=True)
    tensors = load_file(base / "model.safetensors")
    key = "model.layers.0.mlp.experts.down_proj"
    save_file(tensors | {key: tensors[key][:3].clone()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"shape \[3, 32, 48\], the adapter has 4 experts"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    del tensors[key]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor .model\.layers\.0\.mlp\.experts\.down_proj."):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")


def test_the_file_says_how_single_experts_are_named(tmp_path):
    trained("mixtral").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["stored_experts"]["model.layers.1.mlp.experts.gate_up_proj"] == [
        "model.layers.1.block_sparse_moe.experts.{}.w1.weight",
        "model.layers.1.block_sparse_moe.experts.{}.w3.weight",
    ]
    assert sorted(fields["target_parameters"]) == sorted(TARGETS)
