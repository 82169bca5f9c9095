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
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

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


TARGETS = ["q_proj", "v_proj", "down_proj"]


def loaded_onto(
    way: str, adapter: Path, folder: Path, *, is_trainable: bool = False, factors: str = "generated"
) -> Any:
    """An adapter on an offloaded base, by the way that works for it."""
    base = offloaded(way, folder)
    if way != "device_map":
        return PeftModel.from_pretrained(base, adapter, is_trainable=is_trainable)
    model = get_peft_model(base, DoranConfig(target_modules=TARGETS, factors=factors))
    set_peft_model_state_dict(model, load_peft_weights(adapter))
    return model


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "device_map"])
def test_merging_onto_an_offloaded_base_and_back(way: str, tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), DoranConfig(target_modules=TARGETS))
    disturb(model)
    expected, base = logits(model), logits(make_llama())
    model.save_pretrained(tmp_path / "a")
    loaded = loaded_onto(way, tmp_path / "a", tmp_path)
    unmerged = logits(loaded)
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    loaded.unmerge_adapter()
    assert torch.equal(logits(loaded), unmerged)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), base, atol=1e-6, rtol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    fingerprints = [DoranConfig.from_pretrained(str(tmp_path / name)).base_fingerprint for name in ("a", "again")]
    assert fingerprints[0] is not None
    assert fingerprints[0] == fingerprints[1]
    whole = loaded.merge_and_unload()
    torch.testing.assert_close(logits(whole), expected, atol=1e-5, rtol=1e-5)


def trained_by_loop(model: Any, trained: dict[str, torch.nn.Parameter], steps: int = 3) -> list[torch.Tensor]:
    """Losses and gradients of each step of a loop with AdamW, and the parameters at the end."""
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    seen: list[torch.Tensor] = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in trained.values() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return seen + [p.detach() for p in trained.values()]


def assert_equal_training(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("factors", ["generated", "static"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loop_trains_on_an_offloaded_base(way: str, factors: str, checkpointing: bool, tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), DoranConfig(target_modules=TARGETS, factors=factors))
    disturb(model)
    model.save_pretrained(tmp_path / "a")
    loaded = loaded_onto(way, tmp_path / "a", tmp_path, is_trainable=True, factors=factors)
    assert any(p.is_meta for p in loaded.parameters())
    if checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
        loaded.enable_input_require_grads()
    here, there = ({n: p for n, p in each.named_parameters() if p.requires_grad} for each in (model, loaded))
    assert here.keys() == there.keys()
    start = {name: p.detach().clone() for name, p in here.items()}
    assert_equal_training(trained_by_loop(loaded, there), trained_by_loop(model, here))
    assert all((p - start[name]).abs().max() > 1e-3 for name, p in here.items())
    assert all(p.grad is None for p in loaded.parameters() if not p.requires_grad)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


def test_trainer_trains_on_a_device_map_that_offloads(tmp_path: Path) -> None:
    """PEFT's LoRA fails there in the backward pass; under accelerate's cpu_offload Trainer cannot move any model."""
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    data = [{"input_ids": tokens, "labels": tokens}] * 4
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        save_strategy="no", report_to=[],
    )  # fmt: skip
    seen = []
    for base in (make_llama(), offloaded("device_map", tmp_path)):
        torch.manual_seed(0)
        model = get_peft_model(base, DoranConfig(target_modules=TARGETS))
        Trainer(model, arguments, train_dataset=data).train()
        seen.append(logits(model))
    torch.testing.assert_close(seen[1], seen[0], atol=1e-4, rtol=1e-4)
    assert (seen[0] - logits(make_llama())).abs().max() > 1e-2


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_a_loop_trains_doran_core_on_an_offloaded_base(way: str, tmp_path: Path) -> None:
    import doran_core

    config = doran_core.DoranConfig(rank=4, target_modules=TARGETS)
    seen = []
    for base in (make_llama(), offloaded(way, tmp_path)):
        torch.manual_seed(1)
        handle = doran_core.adapt(base, config)
        seen.append(trained_by_loop(base, {n: p for n, p in base.named_parameters() if p.requires_grad}))
        handle.save(tmp_path / f"adapter{len(seen)}")
    assert_equal_training(seen[1], seen[0])


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_doran_core_on_an_offloaded_base(way: str, tmp_path: Path) -> None:
    import doran_core

    config = doran_core.DoranConfig(rank=4, target_modules=TARGETS)
    whole = make_llama()
    torch.manual_seed(1)
    handle = doran_core.adapt(whole, config)
    for layer in handle.layers.values():
        torch.nn.init.normal_(layer.doran_adapter.factors.w2_B, std=0.1)
    handle.save(tmp_path / "one")
    base = offloaded(way, tmp_path)
    loaded = doran_core.load(base, tmp_path / "one")
    torch.testing.assert_close(logits(base), logits(whole), atol=1e-5, rtol=1e-5)
    assert loaded.base_fingerprint() == handle.base_fingerprint()
    handle.save(tmp_path / "folded", form="folded")
    loaded.save(tmp_path / "again", form="folded")
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("folded", "again"))
    assert one == two
    with pytest.raises(TargetError, match=r"partitioned by ZeRO-3 or offloaded; .*doran merge"):
        loaded.merge()
