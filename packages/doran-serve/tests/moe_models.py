"""Tiny mixture-of-experts checkpoints, and adapters of their experts and attention."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from doran_core import DoranConfig
from doran_core.adapter import TrainableAdapter, write_trainable

EXPERTS, HIDDEN, RANK, LAYERS = 4, 128, 4, 2
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
_SIZES = {
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
INNER = {"mixtral": 192, "qwen3_moe": 72, "olmoe": 96, "gpt_oss": 96}
"""Rows of an expert's gate; 72 is no multiple of what vLLM's kernel for the CPU takes, so that vLLM pads."""


def build(family: str, folder: Path) -> None:
    """A checkpoint with random weights, one matrix an expert but for gpt-oss."""
    torch.manual_seed(7)
    inner = INNER[family]
    if family == "mixtral":
        config = MixtralConfig(num_local_experts=EXPERTS, intermediate_size=inner, **_SIZES)
    elif family == "qwen3_moe":
        config = Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=inner, head_dim=32, **_SIZES)
    elif family == "olmoe":
        config = OlmoeConfig(num_experts=EXPERTS, intermediate_size=inner, **_SIZES)
    else:
        rope = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 128,
            "truncate": False,
        }
        sizes = {"head_dim": 32, "rope_parameters": rope, "intermediate_size": inner}
        config = GptOssConfig(num_local_experts=EXPERTS, **sizes, **_SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.save_pretrained(folder)


def write_adapter(family: str, folder: Path, *, seed: int = 3, down_only: bool = False) -> Path:
    """A trainable adapter of the experts, the routers and q_proj; or of the experts' down projections alone."""
    draw = torch.Generator().manual_seed(seed)
    inner, heads = INNER[family], 32 * 4
    modules, stored, renamed = {}, {}, {}

    def parts(*lead: int, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {
            "magnitude": 1.2 + 0.2 * torch.rand(*lead, rows, generator=draw),
            "tau.raw": torch.zeros(1),
            "factors.A": 0.2 * torch.randn(*lead, RANK, columns, generator=draw),
            "factors.B": 0.2 * torch.randn(*lead, rows, RANK, generator=draw),
        }

    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        modules[f"{start}.mlp.experts.down_proj"] = parts(EXPERTS, rows=HIDDEN, columns=inner)
        if not down_only:
            modules[f"{start}.mlp.experts.gate_up_proj"] = parts(EXPERTS, rows=2 * inner, columns=HIDDEN)
            modules[f"{start}.self_attn.q_proj"] = parts(rows=heads, columns=HIDDEN)
            router = f"{start}.mlp.router" if family == "gpt_oss" else f"{start}.mlp.gate"
            modules[router] = parts(rows=EXPERTS, columns=HIDDEN)
            if family == "mixtral":
                renamed[f"{router}.weight"] = f"{start}.block_sparse_moe.gate.weight"
        if family == "gpt_oss":
            continue
        names = "w1 w3 w2" if family == "mixtral" else "gate_proj up_proj down_proj"
        block = f"{start}.block_sparse_moe" if family == "mixtral" else f"{start}.mlp"
        gate, up, down = (f"{block}.experts.{{}}.{name}.weight" for name in names.split())
        stored[f"{start}.mlp.experts.down_proj"] = [down]
        stored[f"{start}.mlp.experts.gate_up_proj"] = [gate, up]
    kinds = {name: "conv1d" for name in modules if family == "gpt_oss" and "experts" in name}
    config = DoranConfig(rank=RANK, factors="static", target_modules=["q_proj"])
    kept = {name: names for name, names in stored.items() if name in modules}
    adapter = TrainableAdapter(config, modules, module_kinds=kinds, stored_experts=kept, stored_names=renamed, ties={})
    write_trainable(adapter, folder)
    return folder
