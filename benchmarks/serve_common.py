"""What the parts of `serve.py` share. Imports neither torch nor vLLM by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["CAPTURE", "LINEAR", "ROOT", "TESTS", "llama_7b", "random_adapters", "report"]

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "packages" / "doran-serve" / "tests"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CAPTURE = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128]}


def report(part: str, **fields: Any) -> None:
    """One line of results, on stdout at once."""
    print("RESULT " + json.dumps({"part": part, **fields}), flush=True)


def llama_7b(folder: Path, layers: int) -> str:
    """A directory with the configuration of Llama-7B, cut to `layers`, and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "vocab_size": 32000,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def random_adapters(folder: Path, count: int, layers: int, targets: tuple[str, ...], rank: int) -> list[str]:
    """Folded adapters for `llama_7b`, and beside each its LoRA (`-lora`), which is the same without the scale."""
    import torch

    from doran_core.adapter import FoldedAdapter, FoldedModule, write_folded
    from doran_serve.bench.strip import write_lora
    from doran_serve.records import ServedAdapter, ServedModule

    shapes = dict.fromkeys(LINEAR[:4], (4096, 4096)) | dict.fromkeys(LINEAR[4:6], (11008, 4096))
    shapes["down_proj"] = (4096, 11008)
    made = []
    for index in range(count):
        target = folder / f"adapter-{index}"
        draw = torch.Generator().manual_seed(index)
        modules = {}
        for layer in range(layers):
            for name in targets:
                d_out, d_in = shapes[name]
                block = "self_attn" if name in LINEAR[:4] else "mlp"
                full = f"model.layers.{layer}.{block}.{name}"
                A = torch.randn(rank, d_in, generator=draw) / d_in**0.5
                B = torch.randn(d_out, rank, generator=draw) * 1e-3
                scale = 1 + 0.05 * torch.randn(d_out, generator=draw)
                modules[full] = FoldedModule(full, A, B, scale, scale.abs())
        write_folded(FoldedAdapter(modules), target)
        served = {name: ServedModule(name, m.A, m.B, m.scale) for name, m in modules.items()}
        write_lora(ServedAdapter(target, "folded", served), folder / f"adapter-{index}-lora")
        made.append(str(target))
    return made
