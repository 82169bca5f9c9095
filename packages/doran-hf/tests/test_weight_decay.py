"""Trainer's weight decay and the parameters of an adapter."""

from __future__ import annotations

from pathlib import Path

from conftest import make_llama
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from doran_hf import DoranConfig, exempt_from_decay


def trainer(folder: Path) -> Trainer:
    model = get_peft_model(make_llama(), DoranConfig(rank=2, task_type="CAUSAL_LM"))
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    arguments = TrainingArguments(
        str(folder), weight_decay=0.5, learning_rate=0.1, use_cpu=True, max_steps=1, report_to=[]
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)


def decayed(made: Trainer) -> set[str]:
    names = {id(p): name for name, p in made.model.named_parameters()}
    groups = made.create_optimizer().param_groups
    return {names[id(p)].rpartition(".")[2] for group in groups if group["weight_decay"] for p in group["params"]}


def test_magnitude_and_tau_are_exempt(tmp_path: Path) -> None:
    assert {"magnitude", "raw"} <= decayed(trainer(tmp_path))  # what Trainer does by itself
    made = exempt_from_decay(trainer(tmp_path))
    assert not decayed(made) & {"magnitude", "raw"}
    assert {"w2_A", "w2_B", "embedding"} <= decayed(made)
    made.train()
    assert all(bool(p.isfinite().all()) for p in made.model.parameters() if p.requires_grad)
