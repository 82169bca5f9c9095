"""Training with transformers' Trainer: learning, checkpoints, gradient checkpointing, penalty, callbacks."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import disturb, logits, make_inputs, make_llama, make_vit
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from doran_hf import DoranConfig, factor_penalty
from doran_hf.penalty import PenaltyHook


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Counting sequences, which a tiny model learns in a few steps."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(index % 8 + 3, index % 8 + 15)
        return {"input_ids": ids, "labels": ids.clone()}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(**(values | options))


def adapted(**options: Any) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(make_llama(), DoranConfig(task_type="CAUSAL_LM", **options))


def losses(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_trainer_learns_and_leaves_the_base_alone(tmp_path: Path) -> None:
    model = adapted(target_modules="all-linear")
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Sentences())
    trainer.train()
    found = losses(trainer)
    assert found[20] < found[1] - 0.2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base[name]) if name in base else not torch.equal(parameter, start[name])


def test_resuming_from_a_checkpoint_gives_equal_losses(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": "all-linear", "dropout": 0.1}
    whole = Trainer(
        model=adapted(**options),
        args=arguments(tmp_path / "whole", max_steps=8, save_strategy="steps", save_steps=4),
        train_dataset=Sentences(),
    )
    whole.train()
    resumed = Trainer(
        model=adapted(**options), args=arguments(tmp_path / "resumed", max_steps=8), train_dataset=Sentences()
    )
    disturb(resumed.model, seed=11)  # the checkpoint has to bring back everything
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    expected, found = losses(whole), losses(resumed)
    assert [found[step] for step in range(5, 9)] == [expected[step] for step in range(5, 9)]
    assert torch.equal(logits(resumed.model), logits(whole.model))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(target_modules="all-linear")
        disturb(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.train()
        ids = make_inputs("llama")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_trainer_with_gradient_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer = Trainer(model=adapted(), args=arguments(tmp_path, max_steps=6, **options), train_dataset=Sentences())
    trainer.train()
    plain = Trainer(model=adapted(), args=arguments(tmp_path, max_steps=6), train_dataset=Sentences())
    plain.train()
    assert losses(trainer) == pytest.approx(losses(plain), abs=2e-3)


def test_bf16_training_of_a_float32_adapter(tmp_path: Path) -> None:
    trainer = Trainer(model=adapted(), args=arguments(tmp_path, bf16=True), train_dataset=Sentences())
    trainer.train()
    found = losses(trainer)
    assert found[20] < found[1]
    assert all(p.dtype == torch.float32 for n, p in trainer.model.named_parameters() if "doran_" in n)


def test_the_scale_is_not_rounded_under_autocast() -> None:
    from doran_hf.layer import doran_layers

    model = adapted(target_modules="all-linear")
    disturb(model)
    for layer in doran_layers(model):
        with torch.no_grad():
            expected = layer.adapter("default").scale_and_factors(layer.view)[0]
            with torch.autocast("cpu", torch.bfloat16):
                found = layer.adapter("default").scale_and_factors(layer.view)[0]
        assert torch.equal(found, expected), layer.name


def test_image_classification_trains(tmp_path: Path) -> None:
    class Images(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            image = torch.zeros(1, 8, 8)
            image[0, index % 8] = 2.0
            return {"pixel_values": image, "labels": torch.tensor(index % 8)}

    model = get_peft_model(make_vit(), DoranConfig(modules_to_save=["classifier"]))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Images())
    trainer.train()
    found = losses(trainer)
    assert found[20] < found[1] - 0.3


def test_penalty_joins_the_loss_in_training_only() -> None:
    model, plain = adapted(factor_penalty=0.5), adapted()
    ids = make_inputs("llama")["input_ids"]
    model.train()
    plain.train()
    penalty = factor_penalty(model)
    assert penalty is not None
    assert penalty > 0
    assert factor_penalty(plain) is None
    expected = plain(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected + penalty)
    model.eval()
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
    model.train()
    assert model(input_ids=ids).loss is None
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("w2_A"))


def test_penalty_finds_the_loss_however_it_comes() -> None:
    model = adapted(factor_penalty=0.5).train()
    ids = make_inputs("llama")["input_ids"]
    mask = torch.ones_like(ids)
    penalty = factor_penalty(model)
    assert penalty is not None
    plain = adapted()(input_ids=ids, labels=ids).loss
    base = model.get_base_model()
    assert torch.allclose(model(input_ids=ids, labels=ids, return_dict=False)[0], plain + penalty)
    assert torch.allclose(base(ids, mask, None, None, None, ids).loss, plain + penalty)  # labels by place
    items = ids.numel() - len(ids)
    shares = [base(ids[rows], mask[rows], None, None, None, ids[rows], num_items_in_batch=items).loss for rows in
              (slice(0, 1), slice(1, None))]  # fmt: skip
    assert torch.allclose(sum(shares), plain + penalty)

    class Own(torch.nn.Module):
        def __init__(self, form: type) -> None:
            super().__init__()
            self.layer, self.form = torch.nn.Linear(4, 4), form

        def forward(self, x: Tensor, target: Tensor) -> Any:
            loss = (self.layer(x) - target).square().mean()
            return {"loss": loss} if self.form is dict else (loss, x)

    for form in (dict, tuple):
        own = get_peft_model(Own(form), DoranConfig(target_modules=["layer"], factor_penalty=0.5)).train()
        found = own(torch.ones(2, 4), torch.zeros(2, 4))
        with torch.no_grad():
            expected = (own.base_model.model.layer(torch.ones(2, 4))).square().mean() + factor_penalty(own)
        assert torch.allclose(found["loss"] if form is dict else found[0], expected)


def test_penalty_counts_once_a_step_whatever_the_accumulation(tmp_path: Path) -> None:
    first = {}
    for batch, accumulation in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer = Trainer(
            model=adapted(factor_penalty=5.0), args=arguments(tmp_path, **options), train_dataset=Sentences()
        )
        trainer.train()
        first[batch] = losses(trainer)[1]
    assert first[2] == pytest.approx(first[8], abs=1e-3)


def test_the_penalty_hook_leaves_with_the_adapter_and_does_not_hinder_copies() -> None:
    model = adapted(factor_penalty=0.5)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    pickle.loads(pickle.dumps(PenaltyHook()))
    base = model.get_base_model()
    assert any(isinstance(hook, PenaltyHook) for hook in base._forward_hooks.values())
    merged = model.merge_and_unload()
    assert not any(isinstance(hook, PenaltyHook) for hook in merged._forward_hooks.values())


def test_generate_is_that_of_the_merged_model() -> None:
    model = adapted(target_modules="all-linear").eval()
    disturb(model)
    ids = make_inputs("llama")["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert expected.shape[1] > ids.shape[1]
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=ids, max_new_tokens=8, do_sample=False), expected)
