"""Parts of `serve.py` that need no engine: the kernels' tests and times. `python serve_kernels.py PART`."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from serve_common import TESTS, report


def kernel_tests() -> None:
    """The kernels against float64."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "kernel_cases.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report("kernel-tests", passed=done.returncode == 0, says=done.stdout.strip().splitlines()[-1:])
    if done.returncode:
        print(done.stdout[-6000:], flush=True)


def graph_time(function: Callable[..., object], *args: Any, repeat: int = 10, **options: Any) -> float:
    """Microseconds of a call on the device, launches not counted: `repeat` of it in one CUDA graph."""
    import torch

    def work() -> None:
        function(*args, **options)

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            work()
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(5):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / 5 / repeat)
    return statistics.median(times)


def kernels() -> None:
    """Time of the two kernels against vLLM's, for each layer of a Llama-7B block, and with other tile sizes."""
    import torch
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    from doran_serve import kernels as ours
    from doran_serve import tile_config

    rank, most, dtype = 32, 8, torch.bfloat16
    layers = {"qkv": ((4096,) * 3, 4096), "o": ((4096,), 4096), "gate_up": ((11008,) * 2, 4096)}
    layers["down"] = ((4096,), 11008)
    for n in (1, 8, 128, 2048):
        slots = (torch.arange(n, device="cuda") % most).to(torch.long)
        meta = LoRAKernelMeta.make(most, 8192, device="cuda")
        meta.prepare_tensors(slots)
        entries = (meta.token_indices_sorted_by_lora_ids, meta.active_lora_ids, meta.num_tokens_per_lora)
        where = (*entries, meta.lora_token_start_loc)
        for name, (sizes, d_in) in layers.items():
            torch.manual_seed(0)
            width, d_out = rank * len(sizes), sum(sizes)
            x = torch.randn(n, d_in, device="cuda", dtype=dtype)
            a = torch.randn(most, width, d_in, device="cuda", dtype=dtype)
            b = torch.randn(most, d_out, rank, device="cuda", dtype=dtype)
            scale = torch.rand(most + 1, d_out, device="cuda") + 0.5
            y = torch.randn(n, d_out, device="cuda", dtype=dtype)
            a_parts = tuple(part.unsqueeze(1).contiguous() for part in a.split(rank, dim=1))
            b_parts = tuple(part.unsqueeze(1).contiguous() for part in b.split(list(sizes), dim=1))
            buffer = torch.empty(len(sizes), n, rank, device="cuda", dtype=torch.float32)
            args = meta.meta_args(n, False)
            shrink_time = graph_time(lora_shrink, x, list(a_parts), buffer, *args, 1.0)
            expand_time = graph_time(lora_expand, buffer, list(b_parts), y, *args, add_inputs=True)
            report("kernels", layer=name, tokens=n, who="vllm", shrink_us=shrink_time, expand_us=expand_time)

            h = ours.shrink(x, a, *where)
            config = tile_config.expand_config(n, rank, dtype)
            blocks = ours.column_blocks(sizes, config.columns, "cuda")
            shrink_time = graph_time(ours.shrink, x, a, *where)
            expand_time = graph_time(ours.expand, h, b, scale, None, y, *where, blocks, config)
            report(
                "kernels",
                layer=name,
                tokens=n,
                who="doran",
                shrink_us=shrink_time,
                expand_us=expand_time,
                configs=[str(tile_config.shrink_config(n, most, width, d_in, dtype)), str(config)],
            )
            if name in ("qkv", "down"):
                sweep(ours, name, n, x, a, b, scale, y, where, sizes)


def sweep(ours: Any, name: str, n: int, x: Any, a: Any, b: Any, scale: Any, y: Any, where: Any, sizes: Any) -> None:
    """Other tile sizes; the best five of each kernel."""
    from triton.runtime.errors import OutOfResources

    from doran_serve import tile_config

    tokens = (16,) if n <= 8 else (16, 32) if n <= 128 else (64, 128)
    wide = 1 << (a.shape[1] - 1).bit_length()
    shrinks = []
    for block in tokens:
        for columns, depth, split, warps in (
            *((32, 128, 8, 4), (32, 256, 8, 4), (128, 64, 8, 4), (128, 128, 4, 4), (128, 128, 8, 4)),
            *((128, 128, 16, 4), (128, 128, 32, 4), (128, 256, 16, 8), (32, 128, 1, 4), (128, 64, 1, 4)),
        ):
            config = tile_config.ShrinkConfig(block, min(columns, wide), depth, split, warps)
            with suppress(OutOfResources):  # more shared memory than there is
                shrinks.append((graph_time(ours.shrink, x, a, *where, config), str(config)))
    expands = []
    for block in tokens:
        for split in (1, 8):
            h = ours.shrink(x, a, *where, tile_config.ShrinkConfig(16, 32, 128, split))
            for columns, warps in ((64, 4), (128, 4), (256, 4), (256, 8)):
                config = tile_config.ExpandConfig(block, columns, 32, warps)
                blocks = ours.column_blocks(sizes, columns, "cuda")
                spent = graph_time(ours.expand, h, b, scale, None, y, *where, blocks, config)
                expands.append((spent, f"parts of h: {h.shape[0]}, {config}"))
    report("kernels", layer=name, tokens=n, best_shrink=sorted(shrinks)[:5], best_expand=sorted(expands)[:6])


if __name__ == "__main__":
    {"kernel-tests": kernel_tests, "kernels": kernels}[sys.argv[1]]()
