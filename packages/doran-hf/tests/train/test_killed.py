"""`doran train` killed at any moment and run again: the result is that of a run that was not killed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import train_and_kill
from runs import as_flags, run, settings
from safetensors.torch import load_file

from doran_hf.layer_table import read_states

pytestmark = pytest.mark.usefixtures("in_folder")


def test_killed_and_run_again_it_ends_as_if_it_had_not_been(capsys: pytest.CaptureFixture[str]) -> None:
    """Killed by SIGKILL after the first checkpoint; a second, half-written checkpoint lies about, too."""
    changes: dict[str, Any] = {"trainer__save_steps": 4}
    train_and_kill(as_flags(settings(**changes)), Path("run/checkpoints/checkpoint-4"), step_seconds=0.2)
    assert not Path("run/metrics.json").exists()
    half = Path("run/checkpoints/checkpoint-999")
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 9')
    metrics = run(**changes)
    assert re.search(r"resuming +from checkpoint-4\n", capsys.readouterr().out)
    assert metrics["training"]["resumed_from"] == "checkpoint-4"
    assert json.loads(Path("run/metrics.json").read_text()) == metrics

    whole = run(**changes, output="whole")
    expected = load_file("whole/adapter/adapter_model.safetensors")
    found = load_file("run/adapter/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (metrics["base"], metrics["adapter"], metrics["tau"]) == (whole["base"], whole["adapter"], whole["tau"])
    assert read_states("run/layers.parquet") == read_states("whole/layers.parquet")


def test_killed_before_its_first_file_or_after_its_last_it_is_finished() -> None:
    changes: dict[str, Any] = {"trainer__max_steps": 2, "trainer__save_steps": 1}
    Path("run").mkdir()
    Path("run/.config.yaml.0123abcd.doran-tmp").write_text("base: b")
    run(**changes)
    names = sorted(str(path) for path in Path("run").rglob("*"))
    assert not [name for name in names if "doran-tmp" in name or "checkpoint" in name]

    Path("run/checkpoints/checkpoint-2").mkdir(parents=True)  # killed between metrics.json and their removal
    run(**changes)
    assert sorted(str(path) for path in Path("run").rglob("*")) == names


def test_killed_after_its_last_step_it_does_not_train_on(capsys: pytest.CaptureFixture[str]) -> None:
    """As if by a kill during the last evaluation: the last checkpoint is there, the adapter and the metrics are not."""
    changes: dict[str, Any] = {"trainer__max_steps": 4, "trainer__save_steps": 4, "keep_checkpoints": True}
    whole = run(**changes)
    expected = load_file("run/adapter/adapter_model.safetensors")
    Path("run/metrics.json").unlink()
    shutil.rmtree("run/adapter")
    printed = capsys.readouterr().out.rpartition("wrote run/adapter")[2]
    again = run(**changes)
    assert printed
    assert capsys.readouterr().out.endswith(printed)
    assert again["training"]["resumed_from"] == "checkpoint-4"
    assert (again["training"]["steps"], again["adapter"], again["tau"]) == (4, whole["adapter"], whole["tau"])
    found = load_file("run/adapter/adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
