"""An adapter of stacked expert weights: its merged checkpoint in a plain vLLM answers as transformers does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from conftest import ALWAYS, end
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from doran_core import DoranConfig
from doran_core.adapter import TrainableAdapter, write_trainable
from doran_core.merge import merge_checkpoint

EXPERTS, HIDDEN, INNER, RANK = 4, 128, 192, 4


def build(folder: Path) -> None:
    torch.manual_seed(7)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        num_local_experts=EXPERTS,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.save_pretrained(folder)


def write_adapter(folder: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    modules, stored = {}, {}
    for layer in range(2):
        for name, rows, columns, parts in (
            ("gate_up_proj", 2 * INNER, HIDDEN, "13"),
            ("down_proj", HIDDEN, INNER, "2"),
        ):
            parameter = f"model.layers.{layer}.mlp.experts.{name}"
            modules[parameter] = {
                "magnitude": 1.2 + 0.2 * torch.rand(EXPERTS, rows, generator=draw),
                "tau.raw": torch.zeros(1),
                "factors.A": 0.2 * torch.randn(EXPERTS, RANK, columns, generator=draw),
                "factors.B": 0.2 * torch.randn(EXPERTS, rows, RANK, generator=draw),
            }
            start = f"model.layers.{layer}.block_sparse_moe.experts.{{}}"
            stored[parameter] = [f"{start}.w{part}.weight" for part in parts]
    config = DoranConfig(rank=RANK, factors="static", target_modules=[])
    write_trainable(TrainableAdapter(config, modules, stored_experts=stored, ties={}), folder)


def test_vllm_answers_as_transformers_on_the_merged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process of its own: vLLM makes the group for experts once in a process, with its first model.
    monkeypatch.setitem(os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    from vllm import LLM, SamplingParams

    build(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    prompts = [[5, 9, 17, 33], [100, 200, 300]]
    expected = {}
    for name in ("base", "merged"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        greedy = [
            model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False, eos_token_id=None) for p in prompts
        ]
        expected[name] = [ids[0, len(p) :].tolist() for ids, p in zip(greedy, prompts, strict=True)]
    assert expected["base"] != expected["merged"]
    llm = LLM(str(tmp_path / "merged"), **ALWAYS)
    try:
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        found = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        assert [list(answer.outputs[0].token_ids) for answer in found] == expected["merged"]
    finally:
        end(llm, separate=True)
