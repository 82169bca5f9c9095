"""Strips a DoRAN adapter of its scale: a LoRA of the same shapes, to compare with in stock vLLM."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from doran_core.adapter.schema import CONFIG_FILE, KEY_PREFIX, TENSOR_FILE
from doran_serve.records import ServedAdapter

__all__ = ["write_lora"]


def write_lora(adapter: ServedAdapter, folder: Path) -> Path:
    """Write the factors of `adapter` as a PEFT LoRA adapter of one rank.

    Args:
        adapter: as `AdapterStore.load` gives it; its modules have one rank, as stock vLLM needs.
        folder: the output directory; created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module in adapter.modules.values():
        tensors[f"{KEY_PREFIX}{module.name}.lora_A.weight"] = module.A.contiguous()
        tensors[f"{KEY_PREFIX}{module.name}.lora_B.weight"] = module.B.contiguous()
    targets = sorted({module.name.rpartition(".")[2] for module in adapter.modules.values()})
    config = {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "target_modules": targets,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    return folder
