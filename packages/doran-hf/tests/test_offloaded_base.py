"""Bases whose weights accelerate keeps elsewhere and brings for each call."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import disturb, logits, make_llama
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from doran_core.errors import TargetError
from doran_hf import DoranConfig


def offloaded(way: str, folder: Path) -> Any:
    model = make_llama()
    if way == "cpu_offload":
        cpu_offload(model, torch.device("cpu"))
    elif way == "disk_offload":
        disk_offload(model, str(folder / "weights"), torch.device("cpu"))
    else:
        model.save_pretrained(folder / "base")
        places = {f"model.layers.{index}": "disk" if index else "cpu" for index in range(3)}
        places |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
        model = AutoModelForCausalLM.from_pretrained(
            folder / "base", device_map=places, offload_folder=str(folder / "weights")
        )
    return model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_an_adapter_is_loaded_onto_offloaded_weights(way: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), DoranConfig(target_modules="all-linear"))
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    base = offloaded(way, tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "a", low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_a_device_map_that_offloads(tmp_path: Path) -> None:
    """PEFT takes the hooks off in loading, and fails in LoRA's case: here with the way that works."""
    model = get_peft_model(make_llama(), DoranConfig())
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    for low_cpu_mem_usage in (False, True):
        with pytest.raises(TargetError, match=r"q_proj: its weight is offloaded.*set_peft_model_state_dict"):
            PeftModel.from_pretrained(
                offloaded("device_map", tmp_path), tmp_path / "a", low_cpu_mem_usage=low_cpu_mem_usage
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the checkpoint of this")  # what is elsewhere does not start at random
        loaded = get_peft_model(offloaded("device_map", tmp_path), DoranConfig())
    set_peft_model_state_dict(loaded, load_peft_weights(tmp_path / "a"))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
