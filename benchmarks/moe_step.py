"""One training step with the experts' stacked weights adapted: DoRAN against PEFT's LoRA with target_parameters.

    python benchmarks/moe_step.py --markdown docs/results/moe-step.md
    python benchmarks/moe_step.py --device cuda --dtype bfloat16 --layers 4 --experts 128 --top-k 8 --hidden 2048 \\
        --moe-hidden 768 --length 2048

A Qwen3-MoE model with random weights, made from a configuration. All methods live in one process and take turns step by
step, in an order that rotates; a ratio is the median over the rounds of the ratio within a round. Memory is that of a
process per method, the median of some: resident memory on the CPU, which varies by 3% between processes, or PyTorch's
allocations on a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_kernels import kernels_of
from hf_step import Step, peak_resident, table
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from doran_hf import DoranConfig

METHODS = ("frozen base", "PEFT LoRA", "DoRAN", "DoRAN static")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def build(method: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        moe_intermediate_size=args.moe_hidden,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    with torch.device(args.device):
        model: Any = Qwen3MoeForCausalLM._from_config(
            config, dtype=getattr(torch, args.dtype), experts_implementation=args.implementation
        )
    if method == "frozen base":
        model.requires_grad_(False)
        model.enable_input_require_grads()  # something has to want a gradient
    elif method == "PEFT LoRA":
        lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=[], target_parameters=TARGETS)
        model = get_peft_model(model, lora)
    else:
        factors = "static" if method.endswith("static") else "generated"
        options = {"target_modules": [], "target_parameters": TARGETS, "factors": factors}
        model = get_peft_model(model, DoranConfig(rank=args.rank, alpha=args.rank, **options))
    trained: nn.Module = model.train()
    return trained


class SyncedStep(Step):
    """A step that waits for the GPU."""

    def __call__(self) -> tuple[float, float]:
        """Seconds of forward and backward with the optimizer's, and 0."""
        import time

        start = time.perf_counter()
        super().__call__()
        if self.ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, 0.0


def make_step(method: str, args: argparse.Namespace) -> Step:
    ids = torch.randint(5, 4096, (args.batch, args.length), generator=torch.Generator().manual_seed(1))
    return SyncedStep(build(method, args), ids.to(args.device))


def measure_memory(method: str, args: argparse.Namespace, queue: multiprocessing.Queue[tuple[float, float]]) -> None:
    """MiB: the peak over some steps, and how far that is above what was held before them."""
    step = make_step(method, args)
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is resident now
    before = torch.cuda.max_memory_allocated() / 1024 if on_gpu else peak_resident()
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() / 1024 if on_gpu else peak_resident()
    queue.put((peak / 1024, (peak - before) / 1024))


def median_memory(methods: list[str], args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Of several processes of each method, which take turns."""
    found: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for _ in range(args.memory_runs):
        for method in methods:
            found[method].append(peak_memory(method, args))
    return {method: (median(p for p, _ in runs), median(s for _, s in runs)) for method, runs in found.items()}


def peak_memory(method: str, args: argparse.Namespace) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(method, args, queue))
    process.start()
    result: tuple[float, float] = queue.get(timeout=900)
    process.join()
    return result


def time_methods(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    steps = {method: make_step(method, args) for method in args.methods}
    for method, step in steps.items():
        step()  # warm up
        if args.device == "cuda":
            kernels = kernels_of(step)
            took, count = sum(took for _, _, took in kernels), sum(count for _, count, _ in kernels)
            print(f"{method}: {took:.1f} ms in {count} kernels")
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in steps}
    order = list(steps)
    for _ in range(args.rounds):
        for method in order:
            times[method].append(steps[method]())
        order.append(order.pop(0))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--implementation", default="grouped_mm", choices=["eager", "batched_mm", "grouped_mm"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--memory-runs", type=int, default=3, help="processes of each method for the memory")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--moe-hidden", type=int, default=256)
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    args = parser.parse_args()
    memory = median_memory(args.methods, args)
    result = table(time_methods(args), memory)
    print(
        f"r = {args.rank}, {args.layers} layers of {args.experts} experts ({args.hidden} x {args.moe_hidden}), "
        f"{args.top_k} of them for a token, {args.batch} x {args.length} tokens, {args.dtype}, {args.implementation}, "
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n\n{result}"
    )
    if args.markdown:
        args.markdown.write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
