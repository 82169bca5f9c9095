"""Time and memory of one adapted linear layer, forward and backward: DoRAN against PEFT's LoRA and DoRA, on the CPU.

    python benchmarks/layer.py --markdown docs/results/layer-cpu.md

Each (method, size) runs in a process of its own for its memory; times are taken in turn, method by method, within one
process, so that a machine that slows down slows all of them. Ratios are medians over the rounds of such pairs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from doran_core import DoranConfig, adapt

METHODS = ("frozen base", "PEFT LoRA", "PEFT DoRA", "DoRAN static", "DoRAN generated")


class Model(nn.Module):
    """One layer with a name to target."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def build(method: str, width: int, rank: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Model(width)
    if method.startswith("PEFT"):
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=rank, target_modules=["proj"], use_dora=method == "PEFT DoRA")
        )
    elif method.startswith("DoRAN"):
        factors = "static" if method == "DoRAN static" else "generated"
        adapt(model, DoranConfig(rank=rank, alpha=rank, target_modules=["proj"], factors=factors))
    return model


def step(model: nn.Module, x: Tensor, cotangent: Tensor) -> Callable[[], None]:
    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        x.grad = None
        model(x).backward(cotangent)

    return run


def inputs(width: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(tokens, width, generator=generator).requires_grad_(),
        torch.randn(tokens, width, generator=generator),
    )


def time_methods(width: int, rank: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    x, cotangent = inputs(width, tokens)
    runs = {method: step(build(method, width, rank), x, cotangent) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for round_number in range(rounds + 2):
        for method, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number >= 2:
                times[method].append(1e3 * (time.perf_counter() - start))
    return times


def measure_memory(method: str, width: int, rank: int, tokens: int, queue: multiprocessing.Queue) -> None:
    """MiB that the steps need beyond what a process holds that has the model and the inputs already."""
    x, cotangent = inputs(width, tokens)
    run = step(build(method, width, rank), x, cotangent)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is resident now
    before = peak_resident()
    for _ in range(3):
        run()
    queue.put((peak_resident() - before) / 1024)


def peak_resident() -> int:
    """Peak resident memory of this process in KiB since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def peak_memory(method: str, width: int, rank: int, tokens: int) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(method, width, rank, tokens, queue))
    process.start()
    result: float = queue.get()
    process.join()
    return result


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    parser.add_argument("--json", type=Path, help="write all times there")
    args = parser.parse_args()
    header = ("d", "r", "method", "ms", "x LoRA", "x DoRA", "peak MiB", "memory x LoRA", "memory x DoRA")
    rows, raw = [], []
    for width in args.widths:
        for rank in args.ranks:
            times = time_methods(width, rank, args.tokens, args.rounds)
            memory = {method: peak_memory(method, width, rank, args.tokens) for method in METHODS}
            raw.append({"width": width, "rank": rank, "ms": times, "peak_mib": memory})
            for method in METHODS:
                rows.append(
                    (
                        str(width),
                        str(rank),
                        method,
                        f"{statistics.median(times[method]):.1f}",
                        f"{ratio(times[method], times['PEFT LoRA']):.2f}",
                        f"{ratio(times[method], times['PEFT DoRA']):.2f}",
                        f"{memory[method]:.0f}",
                        f"{memory[method] / memory['PEFT LoRA']:.2f}",
                        f"{memory[method] / memory['PEFT DoRA']:.2f}",
                    )
                )
                print("  ".join(rows[-1]), flush=True)
    table = "\n".join("| " + " | ".join(row) + " |" for row in [header, tuple("---" for _ in header), *rows])
    print(f"\n{args.tokens} tokens, float32, {torch.get_num_threads()} threads, torch {torch.__version__}\n\n{table}")
    if args.markdown:
        args.markdown.write_text(table + "\n", encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(raw, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
