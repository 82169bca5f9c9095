"""Seconds and memory from a trained update to a vLLM that rolls out with it: merged weights against the adapter alone.

    python benchmarks/policy_sync.py --shape 7b          # a GPU with 80 GB or more, and 15 GB of disk
    python benchmarks/policy_sync.py --shape tiny        # some CPU cores: shows that it runs, and nothing more
    python benchmarks/policy_sync.py --files             # a CPU: adapter sync's files alone, without an engine

Both ways are TRL's colocated `VLLMGeneration.sync_weights`, its own and doran_serve's, for a base with random weights.
Each way runs in a process of its own. Prints one line of JSON each: seconds of every sync after the first, the first
apart, and the GPU memory that a sync takes for a while. With `--files`, a line for each sync: seconds to write the
adapter, to check and copy it, and to check and read the copy for the engine.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
WAYS = ("merged", "merged lora", "adapter")


def main() -> None:
    """Make the base, and run each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--syncs", type=int, default=6)
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="doran-policy-sync-") as folder:
        if options.files:
            time_files(SHAPES[options.shape], options, Path(folder))
            return
        make_base(SHAPES[options.shape], Path(folder))
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--base", folder]
            subprocess.run(command, check=True, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})


def make_base(shape: dict[str, int], folder: Path) -> None:
    """A Llama of this shape with random weights in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, **shape)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def time_files(shape: dict[str, int], options: argparse.Namespace, folder: Path) -> None:
    """Write, admit and load adapters with random values for all linear layers of this shape."""
    import torch

    from doran_core.adapter import FoldedAdapter, FoldedModule, write_folded
    from doran_serve.admission import marked
    from doran_serve.store import AdapterStore

    hidden, inner, rank = shape["hidden_size"], shape["intermediate_size"], options.rank
    sizes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    sizes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    store, adapter = AdapterStore(None, cache_directory=folder / "cache"), folder / "policy"
    for _ in range(options.syncs):
        modules = {}
        for layer in range(shape["num_hidden_layers"]):
            for kind, (rows, columns) in sizes.items():
                name, scale = f"model.layers.{layer}.{kind}", torch.rand(rows) + 0.5
                A, B = torch.randn(rank, columns), torch.randn(rows, rank)
                modules[name] = FoldedModule(name, A, B, scale, scale)
        record = FoldedAdapter(modules, base_fingerprint=None, base_model="base", task_type=None)
        times = [time.perf_counter()]
        write_folded(record, adapter, overwrite=True)
        times.append(time.perf_counter())
        version = store.admit(adapter).version
        times.append(time.perf_counter())
        store.load_admitted(marked(adapter, version))
        times.append(time.perf_counter())
        stages = zip(("write", "admit", "load"), times, times[1:], strict=False)
        print(json.dumps({stage: round(end - start, 2) for stage, start, end in stages}), flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The syncs of one way."""
    import torch
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from doran_hf import DoranConfig

    gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16, device_map="cuda" if gpu else None)
    method = (
        LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        if options.way == "merged lora"
        else DoranConfig(rank=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model = get_peft_model(model, method)
    generation = generation_class(options.way)(
        model, Accelerator(cpu=not gpu), None, gpu_memory_utilization=0.2 if gpu else 0.05, max_model_length=1024
    )
    seconds, peak = [], 0
    for _ in range(options.syncs):
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        generation.sync_weights()
        if gpu:
            torch.cuda.synchronize()
            peak = max(peak, torch.cuda.max_memory_allocated() - before)
        seconds.append(round(time.perf_counter() - start, 4))
    device = torch.cuda.get_device_name() if gpu else "CPU"
    found = {"way": options.way, "shape": options.shape, "rank": options.rank, "device": device}
    return found | {"first": seconds[0], "seconds": seconds[1:], "peak_gib": round(peak / 2**30, 2) if gpu else None}


def generation_class(way: str) -> Any:
    """TRL's VLLMGeneration, its own or doran_serve's, with an engine that needs no tokenizer."""
    import torch
    from trl import GRPOTrainer
    from trl.generation import vllm_generation

    from doran_hf import save_folded
    from doran_serve import with_adapter_sync

    engine: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True}  # nothing is generated
    if torch.cuda.is_available():
        engine["kv_cache_memory_bytes"] = 2**31  # so that vLLM need not find out what is free
    if way == "adapter":
        return with_adapter_sync(GRPOTrainer, save_folded, engine_options=engine).doran_generation  # type: ignore[attr-defined]
    if not torch.cuda.is_available():  # on a CPU vLLM packs its weights and drops them, so that none can be loaded
        from vllm.model_executor.layers import utils

        utils.dispatch_cpu_unquantized_gemm = plain_weights
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, **engine)
    return vllm_generation.VLLMGeneration


def plain_weights(layer: Any, remove_weight: bool) -> None:
    """In place of vLLM's `dispatch_cpu_unquantized_gemm`."""
    import torch

    layer.cpu_linear = torch.nn.functional.linear


if __name__ == "__main__":
    main()
