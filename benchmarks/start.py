"""Time and memory of putting an adapter on a large model, and of loading one: DoRAN against PEFT's LoRA and DoRA.

    python benchmarks/start.py

A Llama of random weights (340 million parameters by default), all linear layers, r = 16, bfloat16. Each method has a
process of its own. Memory is the peak above what the model held before (Linux). Seconds are the processor's: other
programs that run meanwhile then count little; the smallest of the rounds stands in the table.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from doran_hf import DoranConfig

METHODS = ("PEFT LoRA", "PEFT DoRA", "DoRAN", "DoRAN static")


def make_base(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=args.width, intermediate_size=3 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 128, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def config_of(method: str, rank: int) -> Any:
    if method.startswith("PEFT"):
        return LoraConfig(r=rank, target_modules="all-linear", use_dora=method == "PEFT DoRA")
    return DoranConfig(
        rank=rank, target_modules="all-linear", factors="static" if method.endswith("static") else "generated"
    )


def resident(field: str) -> int:
    """KiB of this process: VmRSS now, or VmHWM at most since the last reset."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def measured(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, seconds of the processor, and MiB at the peak above those before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    result = action()
    return result, time.process_time() - start, (resident("VmHWM") - before) / 1024


def run(method: str, args: argparse.Namespace, queue: Any) -> None:
    """Seconds and MiB of a new adapter, then of loading it; a small model before has everything imported."""
    torch.set_num_threads(args.threads)
    small = argparse.Namespace(**(vars(args) | {"width": 128, "layers": 1}))
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(make_base(small), config_of(method, args.rank)).save_pretrained(folder)
        PeftModel.from_pretrained(make_base(small), folder)
    config = config_of(method, args.rank)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(args)
        model, *new = measured(partial(get_peft_model, base, config))
        count = sum(p.numel() for p in model.get_base_model().parameters() if not p.requires_grad)
        model.save_pretrained(folder)
        del model, base
        again = make_base(args)
        _, *loaded = measured(partial(PeftModel.from_pretrained, again, folder))
    queue.put((new, loaded, count))


def in_a_process(method: str, args: argparse.Namespace) -> Any:
    # glibc then gives every larger block back at once: what is resident is what is in use.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "4194304", "MALLOC_TRIM_THRESHOLD_": "4194304"}
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=run, args=(method, args, queue))
    process.start()
    result = queue.get(timeout=1800)
    process.join()
    return result


def table(found: dict[str, list[float]]) -> str:
    header = ["method", "new: s", "new: peak MiB", "load: s", "load: peak MiB"]
    peer = found.get("PEFT DoRA")
    header += ["new x PEFT DoRA: time", "memory", "load x PEFT DoRA: time", "memory"] if peer else []
    rows = [header, ["---"] * len(header)]
    for method, numbers in found.items():
        row = [
            method,
            *(f"{number:.2f}" if place % 2 == 0 else f"{number:.0f}" for place, number in enumerate(numbers)),
        ]
        row += [f"{number / theirs:.2f}" for number, theirs in zip(numbers, peer, strict=True)] if peer else []
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    count = 0
    for _ in range(args.rounds):
        for method in args.methods:
            new, loaded, count = in_a_process(method, args)
            numbers = [*new, *loaded]
            print(method, [f"{number:.2f}" for number in numbers], flush=True)
            found[method] = [min(pair) for pair in zip(found.get(method, numbers), numbers, strict=True)]
    print(
        f"\n{count / 1e6:.0f} million parameters, bfloat16, r = {args.rank}, {args.threads} threads\n\n{table(found)}"
    )


if __name__ == "__main__":
    main()
