"""A few steps of the example's configuration on the real SmolLM2: killed half-way, it ends as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from killing import train_and_kill
from safetensors.torch import load_file
from smollm2 import save_base

from doran_hf.train import load_config, train

EXAMPLE = Path(__file__).parents[4] / "examples" / "train_sentiment.yaml"
PARTS = {
    "positive": (["a quiet triumph", "warm and very funny"], ["from start to end", "with a great cast", "i loved it"]),
    "negative": (["a dull mess", "flat and badly acted"], ["from start to end", "two lost hours", "i left early"]),
}


@pytest.mark.long
def test_killed_and_run_again_the_example_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(Path("base"))
    rows = [
        {"text": f"{first} {second} .", "sentiment": label}
        for label, (begins, ends) in PARTS.items()
        for first in begins
        for second in ends
    ]
    for file, part in (("train.jsonl", rows), ("test.jsonl", rows[::2])):
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in part))
    changes = {
        "trainer.max_steps": 4,
        "trainer.save_steps": 2,
        "trainer.per_device_train_batch_size": 4,
        "trainer.warmup_steps": 1,
        "trainer.use_cpu": True,
    }
    whole = train(load_config(EXAMPLE, changes | {"output": "whole"}))
    assert whole["training"]["steps"] == 4

    flags = [text for name, value in changes.items() for text in (f"--{name}", json.dumps(value))]
    train_and_kill([str(EXAMPLE), *flags], Path("sentiment/checkpoints/checkpoint-2"), step_seconds=1)
    assert not Path("sentiment/metrics.json").exists()

    resumed = train(load_config(EXAMPLE, changes))
    assert resumed["training"]["resumed_from"] == "checkpoint-2"
    assert resumed["adapter"] == whole["adapter"]
    assert resumed["base"] == whole["base"]
    found, expected = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("sentiment", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
