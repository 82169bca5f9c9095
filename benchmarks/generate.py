"""Milliseconds per generated token with adapters that are not merged: DoRAN against PEFT's LoRA and DoRA.

    python benchmarks/generate.py --out results            (a GPU: 8 blocks of Llama-7B, bfloat16)
    python benchmarks/generate.py --out results --cpu      (8 layers of width 1024, float32)

All linear layers, r = 16, one sequence, greedy. The methods take turns in one process; a figure is the median, and the
minimum, over all turns of one turn's time by its tokens. On a machine that others use, ``--cpu-time`` with
OMP_NUM_THREADS=1 counts this process's own time. Writes generate.json and generate.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft_methods import METHODS, make_base, make_method


@dataclass
class Result:
    """What one method took for a token."""

    method: str
    median_ms: float
    minimum_ms: float


def ms_per_token(model: PeftModel, prompt: torch.Tensor, tokens: int, clock: Callable[[], float]) -> float:
    """Of one call of generate()."""
    if prompt.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    made = model.generate(input_ids=prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    assert made.shape[1] == prompt.shape[1] + tokens
    return 1e3 * (clock() - start) / tokens


def measure(
    base: torch.nn.Module,
    methods: Sequence[str],
    rank: int,
    tokens: int,
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """All methods, in turns."""
    device = next(base.parameters()).device
    prompt = torch.randint(2, 512, (1, 16), device=device)
    models = {method: make_method(base, method, "all", rank).eval() for method in methods}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(turns + 1):
        for method in methods if turn % 2 == 0 else reversed(methods):
            taken = ms_per_token(models[method], prompt, tokens, clock)
            if turn:  # the first is to warm up
                times[method].append(taken)
    return [Result(method, statistics.median(taken), min(taken)) for method, taken in times.items()]


def table(results: Sequence[Result]) -> str:
    lines = ["| method | ms per token | minimum | x LoRA | x of minima |", "|---|---|---|---|---|"]
    lora = results[0]
    for row in results:
        ratios = row.median_ms / lora.median_ms, row.minimum_ms / lora.minimum_ms
        lines.append(
            f"| {row.method} | {row.median_ms:.2f} | {row.minimum_ms:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the table")
    parser.add_argument("--cpu", action="store_true", help="8 layers of width 1024, float32, on the CPU")
    parser.add_argument("--small", action="store_true", help="with --cpu: 2 layers of width 64, to see that it runs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="to generate in a turn (default 32)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:4]))
    parser.add_argument("--cpu-time", action="store_true", help="this process's own time; with one thread")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.cpu:
        width, layers = (64, 2) if args.small else (1024, 8)
        base = make_base(width, 2816 * width // 1024, layers, max(2, width // 64), "cpu", torch.float32)
    else:
        base = make_base(4096, 11008, 8, 32, "cuda", torch.bfloat16)
    clock = time.process_time if args.cpu_time else time.perf_counter
    results = measure(base, args.methods, args.rank, args.tokens, args.turns, clock)
    where = f"{'CPU' if args.cpu else torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{where}\n\n{table(results)}", flush=True)
    (args.out / "generate.json").write_text(json.dumps({"device": where, "results": [asdict(r) for r in results]}))
    (args.out / "generate.md").write_text(f"{where}\n\n{table(results)}")


if __name__ == "__main__":
    main()
