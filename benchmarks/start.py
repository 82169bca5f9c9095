"""Time and memory of putting an adapter on a large model, and of loading one: DoRAN against PEFT's LoRA and DoRA.

    python benchmarks/start.py

A Llama of random weights (335 million parameters by default), all linear layers, r = 16, bfloat16. Each number has a
process of its own. Memory is the peak of the resident memory above what the model held before (Linux): as the allocator
is, which keeps freed blocks, and in use, with an allocator that returns them. Seconds are the processor's: other
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


def run(method: str, step: str, folder: str, args: argparse.Namespace, queue: Any) -> None:
    """Seconds and MiB of a new adapter, which is saved, or of loading it; a small model before has all imported."""
    torch.set_num_threads(args.threads)
    small, config = argparse.Namespace(**(vars(args) | {"width": 128, "layers": 1})), config_of(method, args.rank)
    with tempfile.TemporaryDirectory() as elsewhere:
        get_peft_model(make_base(small), config_of(method, args.rank)).save_pretrained(elsewhere)
        PeftModel.from_pretrained(make_base(small), elsewhere)
    base = make_base(args)
    if step == "load":
        queue.put(measured(partial(PeftModel.from_pretrained, base, folder))[1:])
        return
    model, *numbers = measured(partial(get_peft_model, base, config))
    model.save_pretrained(folder)
    queue.put(numbers)


def in_a_process(method: str, step: str, folder: str, args: argparse.Namespace, *, returning: bool) -> list[float]:
    """As :func:`run`. With ``returning``, glibc gives blocks from 64 KiB on back when they are freed."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.pop(name, None)
        if returning:
            os.environ[name] = "65536"
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=run, args=(method, step, folder, args, queue))
    process.start()
    result = queue.get(timeout=1800)
    process.join()
    return list(result)


def measure(method: str, args: argparse.Namespace) -> list[float]:
    """For a new adapter and for loading it: seconds, MiB, and MiB with an allocator that returns blocks."""
    numbers = []
    with tempfile.TemporaryDirectory() as folder:
        for step in ("new", "load"):
            numbers += in_a_process(method, step, folder, args, returning=False)
            numbers.append(in_a_process(method, step, folder, args, returning=True)[1])
    return numbers


def table(found: dict[str, list[float]]) -> str:
    header = ["method", "new: s", "MiB", "MiB in use", "load: s", "MiB", "MiB in use"]
    peer = found.get("PEFT DoRA")
    header += ["new x PEFT DoRA: time", "in use", "load x PEFT DoRA: time", "in use"] if peer else []
    rows = [header, ["---"] * len(header)]
    for method, numbers in found.items():
        row = [method, *(f"{number:.{0 if place % 3 else 2}f}" for place, number in enumerate(numbers))]
        row += [f"{numbers[place] / peer[place]:.2f}" for place in (0, 2, 3, 5)] if peer else []
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
    for _ in range(args.rounds):
        for method in args.methods:
            numbers = measure(method, args)
            print(method, [f"{number:.2f}" for number in numbers], flush=True)
            found[method] = [min(pair) for pair in zip(found.get(method, numbers), numbers, strict=True)]
    print(f"\nbfloat16, r = {args.rank}, {args.threads} threads\n\n{table(found)}")


if __name__ == "__main__":
    main()
