"""The configuration for the PEFT project's method comparison: its budget, and a training like that project's runs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from doran_core import adapt
from doran_hf import DoranConfig

FOLDER = Path(__file__).parents[1] / "method_comparison" / "doran" / "llama-3.2-3B-rank31"
HIDDEN, KEY_VALUE, BLOCKS = 3072, 1024, 28
"""Of Llama-3.2-3B: the width, eight heads of 128 for keys and values, and its blocks."""
LORA = 9_175_040
"""Trainable parameters of that project's LoRA of rank 32 on query and value."""


def test_peft_reads_the_configuration() -> None:
    config = PeftConfig.from_pretrained(FOLDER)
    assert isinstance(config, DoranConfig)
    assert (config.rank, config.alpha, config.target_modules) == (31, 62.0, None)  # None: query and value
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == "DORAN"


def test_the_command_puts_the_configuration_there_and_starts_that_projects_script(tmp_path: Path) -> None:
    folder = tmp_path / "method_comparison" / "MetaMathQA"
    folder.mkdir(parents=True)
    script = "import json, sys, utils, peft\n"
    script += "path = sys.argv[2]; config = peft.PeftConfig.from_pretrained(path)\n"
    script += "print(__name__, sys.argv[1:], utils.NAME, config.peft_type.value, config.rank)\n"
    (folder / "run.py").write_text(script)
    (folder / "utils.py").write_text("NAME = 'theirs'\n")
    command = [sys.executable, str(FOLDER.parents[1] / "run.py")]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    expected = "__main__ ['-v', 'experiments/doran/llama-3.2-3B-rank31'] theirs DORAN 31"
    assert done.stdout.splitlines()[-1] == expected
    refused = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "expected PEFT's method comparison with its run.py" in refused.stderr


def parameters_of(rank: int) -> int:
    """On all blocks of Llama-3.2-3B: a block has its own networks, so that one stands for all."""
    block = nn.Module()
    block.q_proj, block.v_proj = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, KEY_VALUE, bias=False)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    config = PeftConfig.from_pretrained(FOLDER)
    assert isinstance(config, DoranConfig)
    config.rank, config.embedding_dim, config.target_modules = rank, rank, {"q_proj", "v_proj"}
    return BLOCKS * sum(parameter.numel() for parameter in adapt(model, config.core()).parameters())


def test_the_budget_is_loras() -> None:
    assert LORA == BLOCKS * 32 * (HIDDEN + HIDDEN + HIDDEN + KEY_VALUE)
    counts = {rank: parameters_of(rank) for rank in (30, 31, 32)}
    assert counts[31] == 9_110_696
    assert min(counts, key=lambda rank: abs(counts[rank] - LORA)) == 31


def test_it_trains_between_evaluations_in_inference_mode() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.randint(2, 32, (4, 12))
    with torch.no_grad():
        expected = copy.deepcopy(base)(input_ids=ids).logits
    model = get_peft_model(base, PeftConfig.from_pretrained(FOLDER), autocast_adapter_dtype=True)
    assert {name.rpartition(".")[2] for name in model.base_model.targeted_module_names} == {"q_proj", "v_proj"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses: list[Tensor] = []
    for _ in range(3):
        model.eval()
        with torch.inference_mode():
            model.generate(input_ids=ids[:, :4], max_length=8, pad_token_id=1)
        model.train()
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    with torch.inference_mode(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)
