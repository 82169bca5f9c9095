"""Python of an adapted layer: microseconds and calls of Python functions, where the products are next to nothing.

    python benchmarks/python_per_layer.py --out results

A Llama of 8 blocks and width 16 with all linear layers adapted (r = 4), on the CPU, one token a pass, through
get_peft_model. The methods take turns in one process. A figure is what a method takes beyond the base model, divided by
the number of adapted layers: "step" is a forward and a backward pass, "token" a forward pass without gradients.
Times are the process's own, of one thread: other programs do not count. Writes python_per_layer.json and
python_per_layer.md; ``--profile METHOD`` prints instead the functions in which the step's and the token's time is.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft_methods import METHODS, make_base, make_method
from torch import nn

BASE = "base"
BLOCKS = 8
LAYERS = 7 * BLOCKS


@dataclass
class Result:
    """What one method takes of one pass, beyond the base model, for each adapted layer."""

    method: str
    what: str
    minimum_us: float
    median_us: float
    calls: float


def passes(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """One training step without the optimizer's, and one token without gradients."""
    inputs = torch.randn(1, 1, 16).requires_grad_()

    def step() -> None:
        model(inputs_embeds=inputs, use_cache=False).logits.sum().backward()

    @torch.no_grad()
    def token() -> None:
        model(inputs_embeds=inputs, use_cache=False)

    return {"step": step, "token": token}


def count_calls(run: Callable[[], Any]) -> int:
    """Python functions called, those of C not counted."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def measure(methods: Sequence[str], turns: int) -> list[Result]:
    """All methods in turns, a pass of each a turn."""
    base = make_base(16, 32, BLOCKS, 2, "cpu", torch.float32)
    models = {name: base if name == BASE else make_method(base, name, "all", 4) for name in (BASE, *methods)}
    results = []
    for what in ("step", "token"):
        runs = {name: passes(model.train(what == "step"))[what] for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(turns + 3):
            for name, run in runs.items() if turn % 2 == 0 else reversed(runs.items()):
                start = time.process_time()
                run()
                if turn >= 3:
                    times[name].append(1e6 * (time.process_time() - start))
        calls = {name: count_calls(run) for name, run in runs.items()}
        for name in methods:
            least, middle = (of(times[name]) - of(times[BASE]) for of in (min, statistics.median))
            results.append(Result(name, what, least / LAYERS, middle / LAYERS, (calls[name] - calls[BASE]) / LAYERS))
    return results


def table(results: Sequence[Result]) -> str:
    lines = ["| pass | method | us a layer, minimum | median | calls a layer |", "|---|---|---|---|---|"]
    lines += [f"| {r.what} | {r.method} | {r.minimum_us:.1f} | {r.median_us:.1f} | {r.calls:.1f} |" for r in results]
    return "\n".join(lines) + "\n"


def show_profile(method: str, rounds: int) -> None:
    """Where the time of a method's passes is."""
    base = make_base(16, 32, BLOCKS, 2, "cpu", torch.float32)
    model = make_method(base, method, "all", 4)
    for what in ("step", "token"):
        run = passes(model.train(what == "step"))[what]
        for _ in range(3):
            run()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(rounds):
            run()
        profiler.disable()
        print(f"{what}: {rounds} passes of {LAYERS} layers")
        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON and the table")
    parser.add_argument("--turns", type=int, default=100, help="timed passes of each method (default 100)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--profile", choices=METHODS, help="print where this method's time is, and measure nothing")
    args = parser.parse_args(arguments)
    if args.profile:
        show_profile(args.profile, args.turns)
        return
    results = measure(args.methods, args.turns)
    where = f"CPU, torch {torch.__version__}"
    print(f"{where}\n\n{table(results)}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"device": where, "results": [asdict(result) for result in results]})
    (args.out / "python_per_layer.json").write_text(text)
    (args.out / "python_per_layer.md").write_text(f"{where}\n\n{table(results)}")


if __name__ == "__main__":
    main()
