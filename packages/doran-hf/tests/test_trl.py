"""TRL's SFTTrainer, with the configuration and with a model that has its adapter already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_quantized, logits, make_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_bases import make_tokenizer
from trl import SFTConfig, SFTTrainer

from doran_core.errors import ConfigError
from doran_hf import DoranConfig, restore_start

CONVERSATIONS = [
    {
        "prompt": [{"role": "user", "content": f"{letter} {number}"}],
        "completion": [{"role": "assistant", "content": "positive" if letter in "abc" else "negative"}],
    }
    for number in range(4)
    for letter in "abcdef"
]


def trainer(folder: Path, model: Any, config: DoranConfig | None, **options: Any) -> SFTTrainer:
    arguments = SFTConfig(
        str(folder),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        max_length=32,
        **options,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(CONVERSATIONS),
        processing_class=make_tokenizer(),
        peft_config=config,
    )


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_supervised_fine_tuning(wrapped: bool, checkpointing: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DoranConfig(rank=4, target_modules="all-linear", factor_penalty=0.1, task_type="CAUSAL_LM")
    model = get_peft_model(make_llama(), config) if wrapped else make_llama()
    run = trainer(tmp_path, model, None if wrapped else config, gradient_checkpointing=checkpointing)
    frozen = {name: p.clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in run.model.named_parameters() if name in frozen)
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter").eval()
    ids = make_tokenizer()("<user> a 3 <end> <assistant>", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = run.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert make_tokenizer().decode(expected[0, -1].argmax()) == "positive"


def test_a_quantized_base_keeps_its_start(saved_base: Path, tmp_path: Path) -> None:
    base = load_quantized(saved_base, 4)
    expected = logits(base)
    run = trainer(tmp_path, base, DoranConfig(rank=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    rounded = {p.dtype for n, p in run.model.named_parameters() if n.endswith(".magnitude")}
    assert rounded == {torch.bfloat16}, "TRL has stopped rounding: restore_start and its mention in docs/ can go"
    restore_start(run.model)
    assert all(p.dtype == torch.float32 for n, p in run.model.named_parameters() if ".doran_adapter." in n)
    assert (logits(run.model) - expected).abs().max() < 2e-3 * expected.abs().max()
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ConfigError, match="has been trained"):
        restore_start(run.model)
