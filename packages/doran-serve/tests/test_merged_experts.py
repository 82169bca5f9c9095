"""Adapters of stacked expert weights in a real vLLM: as merged checkpoints, and swapped in place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from conftest import Engine
from moe_models import FAMILIES, build, write_adapter
from transformers import AutoModelForCausalLM

from doran_core.merge import merge_checkpoint

PROMPTS = [[5, 9, 17, 33], [100, 200, 300]]


def transformers_answers(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    greedy = [model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False, eos_token_id=None) for p in PROMPTS]
    return [ids[0, len(prompt) :].tolist() for ids, prompt in zip(greedy, PROMPTS, strict=True)]


def weights_of(worker: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in worker.get_model().named_parameters()}


def test_every_parameter_is_the_one_of_the_merged_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).with_name("swap_experts.py")
    command = [sys.executable, str(script), str(tmp_path), *FAMILIES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    found = json.loads(line.removeprefix("FOUND "))
    # Two layers: gate_up_proj, down_proj, the router and q_proj of each, or down_proj alone.
    steps = ["all 8", "down 2", "base 0", "down 2", "all 8", "base 0"]
    assert found == {family: [[step, []] for step in steps] for family in FAMILIES}


def test_a_real_engine_answers_as_transformers_on_the_merged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    # The engine has a process of its own: vLLM makes the group for experts once in a process.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to ask it for its weights
    build("mixtral", tmp_path / "base")
    requests: dict[str, Any] = {"base": None}
    expected = {"base": transformers_answers(tmp_path / "base")}
    for number, name in enumerate(("all", "down"), 1):
        adapter = write_adapter("mixtral", tmp_path / name, seed=number, down_only=name == "down")
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / f"merged-{name}")
        requests[name] = LoRARequest(name, number, str(adapter))
        expected[name] = transformers_answers(tmp_path / f"merged-{name}")
    assert len({json.dumps(answers) for answers in expected.values()}) == 3
    engine = Engine("mixtral", tmp_path / "base", separate=True, merged=True)
    try:
        before = engine.llm.collective_rpc(weights_of)[0]
        for name in ("all", "down", "base", "down", "all"):
            assert engine.answer(PROMPTS, [requests[name]] * len(PROMPTS), 8) == expected[name], name
        turns = ["down", "all"]  # sent together, answered one after the other
        found = engine.answer(PROMPTS, [requests[name] for name in turns], 8)
        assert found == [expected[name][i] for i, name in enumerate(turns)]
        engine.answer(PROMPTS, [None] * len(PROMPTS), 1)
        after = engine.llm.collective_rpc(weights_of)[0]
        assert all(torch.equal(before[name], after[name]) for name in before)
    finally:
        engine.close()
