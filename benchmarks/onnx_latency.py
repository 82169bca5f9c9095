"""Latency in ONNX Runtime of a merged model against its unadapted base, one graph with switched adapters, and PyTorch.

    python benchmarks/onnx_latency.py --model encoder=DIR --model decoder=DIR [--provider cuda] [--rounds 9]

Adapts each Hugging Face directory (q and v, or what --targets says) with random values, exports base, merged model and
multi-adapter graph in float32 (proven, as every export), then times them in turn, round by round, with PyTorch eager on
the merged weights. Every way ends with its outputs in the host's memory, and a cache where it was. A ratio is the
median over the rounds of the ratio within a round; its spread is the quartiles'. An encoder runs whole batches; a
decoder a prompt of 64 tokens, and one token on a past of 64.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from doran_core import DoranConfig, adapt
from doran_core.merge import merge_checkpoint
from doran_export import OnnxRunner, export
from doran_export.graph.spec import cache_name
from doran_export.loading import load_model, open_source

CALLS = 10  # in a measurement
PAST = 64


def make_adapter(model_dir: Path, targets: list[str], out: Path) -> None:
    """A static adapter of rank 16 that changes every target."""
    torch.manual_seed(0)
    model = load_model(open_source(model_dir))
    handle = adapt(model, DoranConfig(rank=16, target_modules=targets, factors="static"))
    with torch.no_grad():
        for _, parameter in handle.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    handle.save(out)


def encoder_calls(
    runners: dict[str, OnnxRunner], model: Any, shape: tuple[int, int]
) -> dict[str, Callable[[], object]]:
    """One batch of full length."""
    ids = np.random.default_rng(0).integers(1000, 2000, shape)
    tensor = torch.from_numpy(ids).to(model.device)
    calls: dict[str, Callable[[], object]] = {
        name: (lambda runner=runner: runner.run({"input_ids": ids})) for name, runner in runners.items()
    }
    return calls | {"PyTorch eager": lambda: model(input_ids=tensor)[0].cpu()}


def decoder_calls(runners: dict[str, OnnxRunner], model: Any, new: int) -> dict[str, Callable[[], object]]:
    """`new` tokens: a prompt of 64 without a past, or one token on a past of 64."""
    ids = np.random.default_rng(0).integers(1000, 2000, (1, PAST))
    calls: dict[str, Callable[[], object]] = {}
    for name, runner in runners.items():
        ones = np.ones((1, PAST + 1), np.int64)
        prompt = {"input_ids": ids, "attention_mask": ones[:, :PAST], "position_ids": np.arange(PAST)[None]}
        empty = runner.graph.empty_past(1)
        if new > 1:
            calls[name] = lambda graph=runner.graph, feed=prompt, past=empty: graph.step(feed, past)
            continue
        _, past = runner.graph.step(prompt, empty)
        step = {"input_ids": ids[:, :1], "attention_mask": ones, "position_ids": np.array([[PAST]])}
        calls[name] = lambda graph=runner.graph, feed=step, past=past: graph.step(feed, past)
    tensor = torch.from_numpy(ids).to(model.device)
    if new > 1:
        return calls | {"PyTorch eager": lambda: model(input_ids=tensor, use_cache=True).logits.cpu()}
    name = cache_name(model)

    def one_token() -> None:
        model(input_ids=tensor[:, :1], use_cache=True, **{name: cache}).logits.cpu()
        cache.crop(-1)

    with torch.inference_mode():
        cache = model(input_ids=tensor, use_cache=True)[name]
    return calls | {"PyTorch eager": one_token}


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, by name and round. In each round all take their turn, each round in another order.

    Threads of a runtime go on spinning for a moment after their work: each way waits for those before it, and has one
    call for its own to wake up.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with torch.inference_mode():
        for number in range(rounds + 2):  # two to warm up
            for name in names[number % len(names) :] + names[: number % len(names)]:
                time.sleep(0.1)
                calls[name]()
                start = time.perf_counter()
                for _ in range(CALLS):
                    calls[name]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if number >= 2:
                    times[name].append((time.perf_counter() - start) / CALLS)
    return times


def print_rows(what: str, times: dict[str, list[float]]) -> None:
    """Rows of the table: every way against the base's ONNX of the same round."""
    base = times["base ONNX"]
    for name, values in times.items():
        ratios = [value / reference for value, reference in zip(values, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        spread = "" if name == "base ONNX" else f" ({low:.2f} to {high:.2f})"
        print(f"| {what} | {name} | {statistics.median(values) * 1e3:.2f} | {middle:.2f}{spread} |", flush=True)


def benchmark(kind: str, model_dir: Path, work: Path, arguments: argparse.Namespace) -> None:
    """All rows of one model."""
    work.mkdir()
    targets = arguments.targets or (["query", "value"] if kind == "encoder" else ["q_proj", "v_proj"])
    make_adapter(model_dir, targets, work / "adapter")
    merge_checkpoint(model_dir, work / "adapter", work / "merged", dtype=torch.float32)
    options: dict[str, Any] = {"exporter": "torch", "providers": [arguments.provider]}
    export(model_dir, work / "base-onnx", **options)
    export(work / "merged", work / "merged-onnx", **options)
    export(out=work / "multi-onnx", base=model_dir, adapters={"one": work / "adapter"}, **options)
    places = {"base ONNX": "base-onnx", "merged ONNX": "merged-onnx", "one of many adapters, ONNX": "multi-onnx"}
    runners = {
        name: OnnxRunner(work / place, providers=[arguments.provider], threads=arguments.threads)
        for name, place in places.items()
    }
    runners["one of many adapters, ONNX"].set_adapter("one")
    model = load_model(open_source(work / "merged")).to(arguments.provider)
    if kind == "encoder":
        for shape in ((1, 32), (16, 64)):
            calls = encoder_calls(runners, model, shape)
            print_rows(f"{type(model).__name__}, {shape[0]} x {shape[1]} tokens", measure(calls, arguments.rounds))
    else:
        for new, what in ((PAST, f"prompt of {PAST}"), (1, f"1 token after {PAST}")):
            calls = decoder_calls(runners, model, new)
            print_rows(f"{type(model).__name__}, {what}", measure(calls, arguments.rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", required=True, metavar="KIND=DIR", help="encoder=DIR or decoder=DIR"
    )
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--targets", nargs="+", help="modules to adapt; default: query and value projections")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    print("| what | way | ms | x base ONNX (quartiles) |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for item in arguments.model:
            kind, _, place = item.partition("=")
            benchmark(kind, Path(place), Path(scratch) / kind, arguments)


if __name__ == "__main__":
    main()
