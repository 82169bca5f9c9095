"""One training step on a GPU: frozen base, PEFT's LoRA and DoRA, and DoRAN plain and fused, in one run.

    python benchmarks/train_step.py --out results [--quick]
    python benchmarks/train_step.py --out results --part 0/2   (and 1/2 on another GPU; then --join)

Models have the shapes of Llama-7B's blocks (8 of them) and of ViT-B/16, with random weights, in bfloat16. For each
setting every method is built on the same base weights and timed with CUDA events: forward and backward together, and
the optimizer's step apart, as medians. The methods take turns, ``--turns`` times each, since a machine's speed drifts;
the median of a method is taken over all its turns. Peak memory is that of forward and backward, all weights included.
Writes ``train_step.json``, one Markdown table and plots, after each setting; with ``--seconds`` no setting is begun
after that time.

PEFT's methods are run as ``get_peft_model`` makes them, with adapters in float32, and once more for LoRA with adapters
in bfloat16 (``autocast_adapter_dtype=False``), which is the fastest that PEFT has. DoRAN has generated factors, learned
tau and the full gradient through the norm; its adapter is always float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTModel

from doran_core import DoranConfig, adapt
from doran_core.kernels import use_backend

METHODS = ("frozen base", "PEFT LoRA", "PEFT LoRA bf16", "PEFT DoRA", "DoRAN plain", "DoRAN fused")
PEERS = ("PEFT LoRA", "PEFT LoRA bf16", "PEFT DoRA")
TARGETS = {
    "llama": {"qv": ["q_proj", "v_proj"], "all": "all-linear"},
    "vit": {"qv": ["q_proj", "v_proj"], "all": "all-linear"},
}


@dataclass(frozen=True)
class Setting:
    """One row of the study."""

    model: str = "llama"
    targets: str = "all"
    rank: int = 32
    tokens: int = 4096
    checkpointing: bool = False


@dataclass
class Result:
    """What one method took in one setting."""

    method: str
    setting: dict[str, Any]
    step_ms: float
    spread_ms: list[float]
    optimizer_ms: float
    peak_gib: float
    trainable: int
    ratios: dict[str, float] = field(default_factory=dict)


def settings(quick: bool) -> list[Setting]:
    usual = [Setting(targets=targets) for targets in ("all", "qv")]
    if quick:
        return [*usual, Setting(rank=384), Setting(checkpointing=True)]
    return list(
        dict.fromkeys(
            [
                *usual,
                *(Setting(targets=t, checkpointing=True) for t in ("all", "qv")),
                *(Setting(targets=t, rank=r) for r in (8, 128, 384) for t in ("all", "qv")),
                *(Setting(targets=t, tokens=n) for n in (512, 1024, 2048, 8192) for t in ("all", "qv")),
                *(Setting(model="vit", targets=t, tokens=64 * 197) for t in ("all", "qv")),
            ]
        )
    )


def make_model(kind: str) -> nn.Module:
    """The base, frozen, in bfloat16 on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        if kind == "llama":
            config = LlamaConfig(
                hidden_size=4096, intermediate_size=11008, num_hidden_layers=8, num_attention_heads=32, vocab_size=32
            )
            model: nn.Module = LlamaModel(config)
        else:
            model = ViTModel(ViTConfig(), add_pooling_layer=False)
    return model.to(torch.bfloat16).requires_grad_(False).train()


def make_input(kind: str, tokens: int) -> dict[str, Tensor]:
    if kind == "vit":
        images = torch.randn(tokens // 197, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
        return {"pixel_values": images.requires_grad_()}
    length = min(tokens, 2048)
    hidden = torch.randn(tokens // length, length, 4096, device="cuda", dtype=torch.bfloat16)
    return {"inputs_embeds": hidden.requires_grad_()}


@contextmanager
def adapted(model: nn.Module, method: str, setting: Setting) -> Iterator[nn.Module]:
    """The model with a method's adapters, which are gone again afterwards."""
    targets: Any = TARGETS[setting.model][setting.targets]
    if method.startswith("PEFT"):
        config = LoraConfig(
            r=setting.rank, lora_alpha=setting.rank, target_modules=targets, use_dora=method == "PEFT DoRA"
        )
        peft = get_peft_model(model, config, autocast_adapter_dtype=method != "PEFT LoRA bf16")
        yield peft
        peft.unload()
        vars(model).pop("peft_config", None)
    elif method.startswith("DoRAN"):
        handle = adapt(model, DoranConfig(rank=setting.rank, alpha=setting.rank, target_modules=targets))
        with use_backend("triton" if method == "DoRAN fused" else "torch"):
            yield model
        handle.remove()
    else:
        yield model


def events_ms(run: Callable[[], None], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def measure(model: nn.Module, methods: list[str], setting: Setting, rounds: int, turns: int) -> list[Result]:
    """All methods in one setting, in turns."""
    taken: dict[str, list[float]] = {method: [] for method in methods}
    last: dict[str, Result] = {}
    for turn in range(turns):
        for method in methods if turn % 2 == 0 else reversed(methods):
            times, last[method] = measure_once(model, method, setting, rounds)
            taken[method] += times
    for method, times in taken.items():
        last[method].step_ms = statistics.median(times)
        last[method].spread_ms = statistics.quantiles(times, n=4)
    return [last[method] for method in methods]


def measure_once(model: nn.Module, method: str, setting: Setting, rounds: int) -> tuple[list[float], Result]:
    """One turn of a method: its steps' milliseconds, and the rest; what it made is gone afterwards."""
    with adapted(model, method, setting) as ready:
        if setting.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        taken = time_and_memory(ready, method, setting, rounds)
        if setting.checkpointing:
            model.gradient_checkpointing_disable()
    del ready
    gc.collect()
    torch.cuda.empty_cache()
    return taken


def time_and_memory(model: nn.Module, method: str, setting: Setting, rounds: int) -> tuple[list[float], Result]:
    inputs = make_input(setting.model, setting.tokens)
    (leaf,) = inputs.values()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cotangent = torch.randn_like(model(**inputs).last_hidden_state)

    def step() -> None:
        leaf.grad = None
        for parameter in parameters:
            parameter.grad = None
        model(**inputs).last_hidden_state.backward(cotangent)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    times = events_ms(step, rounds)
    optimizer_ms = 0.0
    if parameters:
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        optimizer.step()
        optimizer_ms = statistics.median(events_ms(optimizer.step, 5))
    trainable = sum(parameter.numel() for parameter in parameters)
    return times, Result(method, asdict(setting), 0.0, [], optimizer_ms, peak, trainable)


def add_ratios(rows: list[Result]) -> None:
    """Time and memory against PEFT's LoRA and DoRA of the same setting."""
    by_method = {row.method: row for row in rows}
    for row in rows:
        for peer in PEERS:
            if peer in by_method:
                row.ratios[f"time x {peer}"] = row.step_ms / by_method[peer].step_ms
                row.ratios[f"memory x {peer}"] = row.peak_gib / by_method[peer].peak_gib


def table(results: list[Result]) -> str:
    """A line for each setting: milliseconds of each method, then how the fused DoRAN compares."""
    names = [method for method in METHODS if any(row.method == method for row in results)]
    titles = ["model", "targets", "r", "tokens", "checkpointing", *(f"{name} ms" for name in names)]
    titles += [*(f"x {peer}" for peer in PEERS), "GiB", *(f"GiB x {peer}" for peer in PEERS), "optimizer ms"]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    by_setting: dict[Setting, dict[str, Result]] = {}
    for row in results:
        by_setting.setdefault(Setting(**row.setting), {})[row.method] = row
    for setting, rows in by_setting.items():
        fused = rows.get("DoRAN fused")
        cells = [setting.model, setting.targets, setting.rank, setting.tokens, "yes" if setting.checkpointing else "no"]
        cells += [f"{rows[name].step_ms:.1f}" if name in rows else "" for name in names]
        if fused is not None:
            time_and_memory = [
                [f"{fused.ratios[key]:.3f}" if (key := f"{kind} x {peer}") in fused.ratios else "" for peer in PEERS]
                for kind in ("time", "memory")
            ]
            cells += [*time_and_memory[0], f"{fused.peak_gib:.2f}", *time_and_memory[1], f"{fused.optimizer_ms:.2f}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[Result], out: Path) -> None:
    """Step time over tokens and over ranks, all linear layers, as a ratio to the frozen base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, varied, fixed in ((axes[0], "tokens", {"rank": 32}), (axes[1], "rank", {"tokens": 4096})):
        rows = [
            row
            for row in results
            if row.setting["model"] == "llama"
            and row.setting["targets"] == "all"
            and not row.setting["checkpointing"]
            and all(row.setting[key] == value for key, value in fixed.items())
        ]
        base = {row.setting[varied]: row.step_ms for row in rows if row.method == "frozen base"}
        for method in METHODS[1:]:
            points = sorted((row.setting[varied], row.step_ms) for row in rows if row.method == method)
            axis.plot([x for x, _ in points], [ms / base[x] for x, ms in points], marker="o", label=method)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(varied)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("forward and backward, x frozen base")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def write(results: list[Result], out: Path, device: str) -> None:
    """The JSON, the table and, if there is something to compare, the plot."""
    text = json.dumps({"device": device, "results": [asdict(row) for row in results]}, indent=1)
    out.with_suffix(".json").write_text(text)
    out.with_suffix(".md").write_text(f"{device}\n\n" + table(results))
    if len({row.setting["rank"] for row in results}) > 2:
        plot(results, out.with_suffix(".svg"))


def join(out: Path, order: list[Setting]) -> None:
    """One JSON, table and plot from those of the parts."""
    parts = [json.loads(path.read_text()) for path in sorted(out.glob("train_step-*.json"))]
    results = [Result(**row) for part in parts for row in part["results"]]
    results.sort(key=lambda row: order.index(Setting(**row.setting)))
    write(results, out / "train_step", " and ".join(sorted({part["device"] for part in parts})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON, the table and the plot")
    parser.add_argument("--quick", action="store_true", help="four settings")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps in a turn (default 7)")
    parser.add_argument("--turns", type=int, default=3, help="of each method (default 3)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no setting after this time")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--part", metavar="K/N", help="only every N-th setting, from the K-th (from 0) on")
    parser.add_argument("--join", action="store_true", help="run nothing: put the parts in the folder together")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen, name = settings(args.quick), "train_step"
    if args.join:
        join(args.out, chosen)
        return
    if args.part:
        index, parts = map(int, args.part.split("/"))
        chosen, name = chosen[index::parts], f"train_step-{index}"
    results: list[Result] = []
    models: dict[str, nn.Module] = {}
    began = time.monotonic()
    for setting in chosen:
        if time.monotonic() - began > args.seconds:
            print(f"not run within {args.seconds:.0f} s: {setting}", flush=True)
            continue
        if setting.model not in models:
            models.clear()
            gc.collect()
            torch.cuda.empty_cache()
            models[setting.model] = make_model(setting.model)
        rows = measure(models[setting.model], args.methods, setting, args.rounds, args.turns)
        add_ratios(rows)
        results += rows
        print(table(rows), flush=True)
        write(results, args.out / name, f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
