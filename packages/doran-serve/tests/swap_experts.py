"""Swap adapters of experts in vLLM's models without an engine: `python swap_experts.py FOLDER FAMILY...`.

For each family, prints after `FOUND` the steps: the adapter, and what differs from the model that vLLM loads from the
adapter's merged checkpoint: names of parameters, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
from moe_models import build, write_adapter

from doran_core.merge import merge_checkpoint

STEPS = ("all", "down", "base", "down", "all", "base")


def load(folder: Path, dtype: str) -> torch.nn.Module:
    """vLLM's model of a checkpoint, as an engine in merged mode loads it."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from doran_serve.merged.mode import merged_options

    options: dict[str, Any] = {"dtype": dtype, "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 128}
    config = EngineArgs(model=str(folder), additional_config=merged_options(), **options).create_engine_config()
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{folder.parent}/meeting", 0, "gloo")
            initialize_model_parallel(1, 1)
        return get_model(vllm_config=config)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def steps(family: str, folder: Path) -> list[tuple[str, list[str] | str]]:
    """What differs after each step."""
    from doran_serve.merged.weights import MergedWeights
    from doran_serve.store import AdapterStore

    dtype = "bfloat16" if family == "olmoe" else "float32"
    torch.set_default_dtype(torch.float32)
    build(family, folder / "base")
    adapters = {
        name: write_adapter(family, folder / name, seed=seed, down_only=name == "down")
        for seed, name in enumerate(("all", "down"))
    }
    for name, adapter in adapters.items():
        merge_checkpoint(folder / "base", adapter, folder / f"merged-{name}")
    torch.set_default_dtype(getattr(torch, dtype))
    expected = {name: weights(load(folder / f"merged-{name}", dtype)) for name in adapters}
    model = load(folder / "base", dtype)
    before = expected["base"] = weights(model)
    swapped = MergedWeights(model, AdapterStore(folder / "base", stacks=True, cache_directory=folder / "cache"))
    found: list[tuple[str, list[str] | str]] = []
    for name in STEPS:
        swapped.swap(None if name == "base" else str(adapters[name]))
        now = weights(model)
        # q and the routers are computed from vLLM's own weights, which are rounded to its dtype before.
        eps = 4 * torch.finfo(torch.get_default_dtype()).eps
        different = [
            key
            for key in now
            if not (
                torch.allclose(now[key], expected[name][key], atol=eps, rtol=eps)
                if "experts" not in key
                else torch.equal(now[key], expected[name][key])
            )
        ]
        changed = sum(not torch.equal(now[key], before[key]) for key in now)
        found.append((f"{name} {changed}", different))
    return found


def main(folder: str, *families: str) -> None:
    """Print what was found."""
    from doran_serve import register

    torch.accelerator.empty_cache = lambda: None  # which fails without an accelerator, outside an engine
    register()
    found = {}
    for family in families:
        Path(folder, family).mkdir()
        found[family] = steps(family, Path(folder, family))
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
