"""Saving and loading: every way that PEFT offers, and doran_core as a reader of what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MAKERS, disturb, logits, make_bert, make_gpt2, make_llama
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from doran_core import read_adapter
from doran_core.adapter import TrainableAdapter
from doran_core.errors import (
    BaseMismatchError,
    FormatVersionError,
    MissingKeyError,
    NonFiniteError,
    UnexpectedKeyError,
)
from doran_core.merge import merge_checkpoint
from doran_hf import DoranConfig
from doran_hf.layer import doran_layers

OPTIONS: list[dict[str, Any]] = [
    {},
    {"target_modules": "all-linear", "share_output": True},
    {"sharing": "model", "target_modules": "all-linear"},
    {"factors": "static", "tau_kind": "fixed", "tau_granularity": "row"},
    {"tau_kind": "zero", "experts": True},
    {"rank_pattern": {"layers.1.self_attn.v_proj": 3}, "alpha_pattern": {"v_proj": 2.0}},
    {"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
]

LOADER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import doran_hf
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter, adapter_name="other").eval()
ids = torch.load(out + ".in", weights_only=True)
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, out)
"""


def saved_base(folder: Path) -> Path:
    make_llama().save_pretrained(folder / "base")
    return folder / "base"


def trained(base: Path, **options: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = get_peft_model(model, DoranConfig(task_type="CAUSAL_LM", **options))
    disturb(wrapped)
    return wrapped


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    no_digests = {"digest": None, "tensors_digest": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | no_digests | changes))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loads_equal_to_the_bit_under_another_name(
    options: dict[str, Any], low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    base = saved_base(tmp_path)
    model = trained(base, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base),
        tmp_path / "adapter",
        adapter_name="other",
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_new_process_gives_the_same_bits(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    model = trained(base, target_modules="all-linear")
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "logits.pt"
    ids = torch.randint(3, 97, (2, 7))
    torch.save(ids, f"{out}.in")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(
        [sys.executable, "-c", LOADER, str(base), str(tmp_path / "adapter"), str(out)],
        check=True,
        env=os.environ | threads,
    )
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    assert torch.equal(torch.load(out, weights_only=True), expected)


def test_auto_classes_find_base_and_adapter(tmp_path: Path) -> None:
    model = trained(saved_base(tmp_path))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(config, DoranConfig)
    assert config.target_modules == {"q_proj", "v_proj"}


def test_half_precision_base_keeps_a_float32_adapter(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), DoranConfig())
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
            tmp_path / "adapter",
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        assert torch.equal(logits(loaded), expected)
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").values()
    )


@pytest.mark.parametrize("family", MAKERS)
def test_the_core_reads_what_is_saved(family: str, tmp_path: Path) -> None:
    model = get_peft_model(MAKERS[family](), DoranConfig(target_modules="all-linear", tau_granularity="row"))
    disturb(model)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert isinstance(adapter, TrainableAdapter)
    layers = {layer.name: layer for layer in doran_layers(model)}
    assert set(adapter.modules) == set(layers)
    assert adapter.config.tau_granularity == "row"
    assert str(adapter.base_fingerprint).startswith("sha256:")
    assert adapter.created_by.startswith("doran-hf")
    assert adapter.module_kinds == {
        name: layer.view.kind for name, layer in layers.items() if layer.view.kind != "linear"
    }


def test_the_core_merges_what_is_saved(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    model = trained(base, target_modules="all-linear")
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert (logits(AutoModelForCausalLM.from_pretrained(merged)) - expected).abs().max() < 1e-4


def test_gpt2_merges_by_the_core(tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), DoranConfig())
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert (logits(AutoModelForCausalLM.from_pretrained(merged)) - expected).abs().max() < 1e-4


def test_fingerprint_is_the_same_in_bf16_and_unknown_in_fp16(tmp_path: Path) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        get_peft_model(make_llama(dtype), DoranConfig()).save_pretrained(tmp_path / str(dtype))
        found[dtype] = json.loads((tmp_path / str(dtype) / "adapter_config.json").read_text())["base_fingerprint"]
    assert found[torch.float32] == found[torch.bfloat16] is not None
    assert found[torch.float16] is None


def test_fingerprint_is_of_the_base_also_while_merged(tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), DoranConfig())
    model.save_pretrained(tmp_path / "plain")
    disturb(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    first, second = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())["base_fingerprint"]
        for name in ("plain", "merged")
    )
    assert first == second is not None


def test_wrong_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), DoranConfig())
    model.save_pretrained(tmp_path)
    right = json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]
    with pytest.raises(BaseMismatchError) as error:
        PeftModel.from_pretrained(make_llama(seed=9), tmp_path)
    assert right in str(error.value)
    assert str(error.value).count("sha256:") == 2
    edit_config(tmp_path, base_fingerprint=None)
    PeftModel.from_pretrained(make_llama(seed=9), tmp_path)


def test_config_can_go_on_to_another_base(tmp_path: Path) -> None:
    config = DoranConfig()
    get_peft_model(make_llama(), config).save_pretrained(tmp_path)
    get_peft_model(make_llama(seed=9), config)


def test_modules_to_save_and_biases_come_along(tmp_path: Path) -> None:
    def wrap() -> PeftModel:
        return get_peft_model(make_bert(), DoranConfig(task_type="SEQ_CLS", bias="doran_only"))

    model = wrap()
    disturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "doran_" not in name:
                parameter.add_(0.1)
    expected = logits(model, "bert")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path, adapter_name="other")
    assert torch.equal(logits(loaded, "bert"), expected)
    extra = read_adapter(tmp_path).extra
    assert {"classifier.weight", "classifier.bias"} < set(extra)
    assert any(name.endswith("query.bias") for name in extra)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    get_peft_model(make_llama(), DoranConfig()).save_pretrained(tmp_path)
    edit_config(tmp_path, format_version=3)
    with pytest.raises(FormatVersionError, match="format_version 3"):
        PeftModel.from_pretrained(make_llama(), tmp_path)
    edit_config(tmp_path, format_version=3, field_of_the_future=1)
    with pytest.raises(FormatVersionError, match=r"adapter_config\.json: .*newer"):
        PeftModel.from_pretrained(make_llama(), tmp_path)


@pytest.mark.parametrize("fault", ["missing", "unknown", "nan"])
def test_broken_tensors_are_refused(fault: str, tmp_path: Path) -> None:
    get_peft_model(make_llama(), DoranConfig()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("doran_adapter.magnitude"))
    if fault == "missing":
        tensors.pop(key)
    elif fault == "unknown":
        tensors[key.replace("magnitude", "amplitude")] = tensors[key].clone()
    else:
        tensors[key][0] = float("nan")
    save_file(tensors, file)
    edit_config(tmp_path)
    errors = {"missing": MissingKeyError, "unknown": UnexpectedKeyError, "nan": NonFiniteError}
    with pytest.raises(errors[fault], match="magnitude" if fault != "unknown" else "amplitude"):
        PeftModel.from_pretrained(make_llama(), tmp_path)


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), DoranConfig(rank=2))
    model.save_pretrained(tmp_path / "a")
    other = make_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(other, tmp_path / "a")
    assert [name for name, _ in other.named_modules()] == names
