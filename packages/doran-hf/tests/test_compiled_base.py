"""Bases that were compiled before they are adapted, in whole or in part: the adapter is that of the plain base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import disturb, logits, make_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from doran_core import DoranConfig as CoreConfig
from doran_core import adapt, load
from doran_core.merge import merge_checkpoint
from doran_hf import DoranConfig


def compiled() -> Any:
    return torch.compile(make_llama(), backend="eager")


def with_a_compiled_block() -> Any:
    model = make_llama()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def compiled_and_called() -> Any:
    model = compiled()
    logits(model)
    return model


BASES = {
    "plain": make_llama,
    "compiled": compiled,
    "one block": with_a_compiled_block,
    "called": compiled_and_called,
}


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r"model\.layers\.\d\.mlp\.up_proj"])
def test_its_adapter_is_that_of_the_plain_base(make: Callable[[], Any], targets: Any, tmp_path: Path) -> None:
    plain = get_peft_model(make_llama(), DoranConfig(target_modules=targets))
    plain.save_pretrained(tmp_path / "plain")
    model = get_peft_model(make(), DoranConfig(target_modules=targets))
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    saved, config = load_file(tmp_path / "a" / "adapter_model.safetensors"), _config(tmp_path / "a")
    assert saved.keys() == load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()
    assert config["base_fingerprint"] == _config(tmp_path / "plain")["base_fingerprint"]
    assert not any("_orig_mod" in str(value) for value in config.values())
    for other in BASES.values():
        base = other()
        before = logits(base)
        loaded = PeftModel.from_pretrained(base, tmp_path / "a")
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before, expected, atol=1e-3)


def _config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return values


def test_it_is_merged_as_files(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(with_a_compiled_block(), DoranConfig(target_modules="all-linear"))
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    torch.testing.assert_close(
        logits(type(make_llama()).from_pretrained(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_in_doran_core(make: Callable[[], Any], tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "rank": 2}
    handle = adapt(make(), CoreConfig(**options))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.05)
    expected = logits(handle.model)
    handle.save(tmp_path / "a")
    for other in BASES.values():
        loaded = load(other(), tmp_path / "a")
        assert loaded.layers.keys() == handle.layers.keys()
        torch.testing.assert_close(logits(loaded.model), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_was_saved_under_the_compiled_names_still_loads(tmp_path: Path) -> None:
    """As earlier versions saved them, with the fingerprint of these names."""
    from doran_core.checkpoint.fingerprint import fingerprint_weights

    model = get_peft_model(with_a_compiled_block(), DoranConfig(target_modules=["q_proj"]))
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    weights = {
        name.removesuffix(".weight"): weight
        for name, weight in with_a_compiled_block().named_parameters()
        if name.endswith("q_proj.weight")
    }
    config["base_fingerprint"] = fingerprint_weights(weights.items())
    for name in ("digest", "tensors_digest"):
        config.pop(name, None)
    path.write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(with_a_compiled_block(), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
