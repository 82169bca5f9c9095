"""Bandwidth of the fused passes on a GPU, against a device-to-device copy of the same size in the same run.

    python benchmarks/kernel_bandwidth.py [--rank 32]

Each pass runs over several sets of buffers in turn, so that the cache holds none of them. A byte counts once when it is
read and once when it is written.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from doran_core.kernels.triton_passes import TritonPasses

SHAPES = [(4096, 4096), (8192, 4096), (4096, 11008), (16384, 4096)]
SETS = 6


def milliseconds(runs: list[Callable[[], object]], rounds: int = 40) -> float:
    for run in runs:
        run()
    times = []
    for index in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # the launches are queued behind it, so that none of them is waited for
        start.record()
        for offset in range(SETS):
            runs[(index + offset) % SETS]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / SETS)
    return statistics.median(times)


def rates_of(passes: TritonPasses, tokens: int, d_out: int, rank: int) -> list[float]:
    """GB/s of a copy, of the pass over the output and of the pass over the gradient."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    scale = torch.rand(d_out, device="cuda") + 0.5
    scaled_B, hidden = random(d_out, rank), random(tokens, rank)
    pairs = [(random(tokens, d_out), random(tokens, d_out)) for _ in range(SETS)]
    one = 2 * tokens * d_out / 1e6  # MB: one tensor
    copy = milliseconds([lambda a=a, b=b: a.copy_(b) for a, b in pairs])
    expand = milliseconds([lambda a=a: passes.expand(a, hidden, scaled_B, scale, None, inplace=True) for a, _ in pairs])
    gradient = milliseconds(
        [lambda a=a, b=b: passes.scale_gradient(a, b, scale, None, is_output=True) for a, b in pairs]
    )
    return [2 * one / copy, 2 * one / expand, 3 * one / gradient]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args()
    passes = TritonPasses()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, rank {args.rank}, bfloat16\n")
    print("| tokens x d_out | copy GB/s | expand GB/s | x copy | scale gradient GB/s | x copy |")
    print("| --- " * 6 + "|")
    for tokens, d_out in SHAPES:
        rates = rates_of(passes, tokens, d_out, args.rank)
        print(
            f"| {tokens} x {d_out} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} "
            f"| {rates[2]:.0f} | {rates[2] / rates[0]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
