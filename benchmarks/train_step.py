"""A training step as users run it: get_peft_model, forward, backward, fused AdamW; eager and compiled, against PEFT.

    python benchmarks/train_step.py --out results                      (a GPU: 8 or 4 blocks of Llama-7B, bfloat16)
    python benchmarks/train_step.py --out results --cpu --rounds 1     (a small model, to see that it runs)

All methods of a setting live in one process on one set of base weights and take turns, since a machine's speed drifts.
Milliseconds are medians and minima over all turns, of steps that are waited for one by one; "in a row" is the mean of
the steps of a turn without a wait between them, as a training loop runs them, and of these the median over the turns.
Ratios are to PEFT's LoRA with adapters in the base's precision, its fastest. Memory is the peak of a step, with all
weights and the optimizer's state. On a GPU the time that the kernels take and their number are those of one more step
under the profiler. Writes train_step.json and train_step.md after each setting; with ``--seconds`` no setting is begun
after that time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import kernels_of
from peft_methods import METHODS, make_base, make_method
from torch import Tensor, nn

FACE = ("LoRA", "DoRAN")
"""The methods of settings that do not ask for all."""


@dataclass(frozen=True)
class Setting:
    """One comparison. ``base`` is bfloat16, or 4-bit by bitsandbytes; ``blocks`` of the model."""

    targets: str = "all"
    rank: int = 32
    tokens: int = 4096
    compiled: bool = False
    checkpointing: bool = False
    dropout: float = 0.0
    four_bit: bool = False
    blocks: int = 8
    methods: tuple[str, ...] = FACE


@dataclass
class Result:
    """What one method took."""

    setting: dict[str, Any]
    method: str
    median_ms: float
    minimum_ms: float
    row_ms: float
    peak_gib: float
    gpu_ms: float
    launches: int
    first_s: float


def settings() -> list[Setting]:
    """By importance, so that a run that ends early has the first ones."""
    return [
        Setting(methods=METHODS),
        Setting(compiled=True, blocks=4, methods=("LoRA", "DoRAN", "DoRAN static")),
        Setting(tokens=512),
        Setting(tokens=512, compiled=True, blocks=4),
        Setting(targets="qv"),
        Setting(checkpointing=True),
        Setting(rank=384),
        Setting(tokens=512, blocks=4),
        Setting(dropout=0.05),
        Setting(tokens=8192),
        Setting(tokens=2048),
        Setting(tokens=1024),
        Setting(four_bit=True),
        Setting(compiled=True, blocks=4, rank=384),
        Setting(compiled=True, blocks=4, tokens=2048),
        Setting(targets="qv", tokens=512),
    ]


class Method:
    """One method in one setting: the model, its optimizer and its step."""

    def __init__(self, base: nn.Module, name: str, setting: Setting, compiler: dict[str, str]) -> None:
        self.name, self.setting, self.times, self.rows = name, setting, list[float](), list[float]()
        device = next(base.parameters()).device
        self.is_cuda = device.type == "cuda"
        before = self._allocated()
        self.model: Any = make_method(base, name, setting.targets, setting.rank, setting.dropout)
        self.model.train()
        if setting.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        if setting.compiled:
            self.model.compile(fullgraph=True, **compiler)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=self.is_cuda)
        length = min(setting.tokens, 2048)
        hidden = base.config.hidden_size  # type: ignore[union-attr]
        dtype = base.get_input_embeddings().weight.dtype  # type: ignore[operator,union-attr]
        shape = setting.tokens // length, length, hidden
        self.inputs = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        self.labels = torch.randint(512, shape[:2], device=device)
        start = time.perf_counter()
        for _ in range(3):
            self.step()
        self.synchronize()
        self.first_s = time.perf_counter() - start
        self.own_bytes = self._allocated() - before
        self.peak_bytes = 0

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        self.inputs.grad = None
        loss: Tensor = self.model(inputs_embeds=self.inputs, labels=self.labels, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        return loss

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.is_cuda else 0

    def turn(self, rounds: int) -> None:
        """Take the time of some steps, and the memory of one."""
        self.step()
        self.synchronize()
        idle = self._allocated()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(rounds):
            start = time.perf_counter()
            self.step()
            self.synchronize()
            self.times.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(rounds):
            self.step()
        self.synchronize()
        self.rows.append(1e3 * (time.perf_counter() - start) / rounds)
        if self.is_cuda:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - idle)
        self.optimizer.zero_grad()

    def on_gpu(self) -> tuple[float, int, list[tuple[str, int, float]]]:
        """Milliseconds of one step's kernels, their number, and the dearest of them."""
        if not self.is_cuda:
            return 0.0, 0, []

        def step() -> None:
            self.step()
            self.synchronize()

        kernels = kernels_of(step)
        shown = [(name[:100], count, took) for name, count, took in kernels[:40]]
        return sum(took for _, _, took in kernels), sum(count for _, count, _ in kernels), shown


def measure(
    base: nn.Module, setting: Setting, rounds: int, turns: int, compiler: dict[str, str]
) -> tuple[list[Result], Any]:
    """All methods of one setting, in turns, and the dearest kernels of each."""
    methods = [Method(base, name, setting, compiler) for name in setting.methods]
    for turn in range(turns):
        for method in methods if turn % 2 == 0 else reversed(methods):
            method.turn(rounds)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in base.parameters())
    results, kernels = [], {}
    for method in methods:
        gpu_ms, launches, kernels[method.name] = method.on_gpu()
        peak = (stored + method.own_bytes + method.peak_bytes) / 2**30
        times = method.times
        took = statistics.median(times), min(times), statistics.median(method.rows)
        results.append(Result(asdict(setting), method.name, *took, peak, gpu_ms, launches, method.first_s))
    return results, kernels


HEADER = (
    "targets", "r", "tokens", "compiled", "other", "method", "ms", "minimum", "x LoRA", "x of minima",
    "in a row", "x LoRA", "GiB", "x LoRA", "GPU ms", "x LoRA", "kernels",
)  # fmt: skip


def table(results: Sequence[Result]) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in results:
        facts = row.setting
        lora = next(r for r in results if r.setting == facts and r.method == "LoRA")
        other = [name for name in ("checkpointing", "four_bit") if facts[name]]
        other += [f"{facts['blocks']} blocks"] + ([f"dropout {facts['dropout']}"] if facts["dropout"] else [])
        gpu = (f"{row.gpu_ms:.1f}", f"{row.gpu_ms / lora.gpu_ms:.3f}") if lora.gpu_ms else ("", "")
        memory = (f"{row.peak_gib:.2f}", f"{row.peak_gib / lora.peak_gib:.3f}")
        cells = (
            facts["targets"], facts["rank"], facts["tokens"], "yes" if facts["compiled"] else "no", ", ".join(other),
            row.method, f"{row.median_ms:.1f}", f"{row.minimum_ms:.1f}", f"{row.median_ms / lora.median_ms:.3f}",
            f"{row.minimum_ms / lora.minimum_ms:.3f}", f"{row.row_ms:.1f}", f"{row.row_ms / lora.row_ms:.3f}",
            *memory, *gpu, row.launches or "",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def quantized(base: nn.Module) -> nn.Module | None:
    """The base with its linear layers in 4 bits, as QLoRA stores them; None without bitsandbytes."""
    try:
        import bitsandbytes
    except ImportError:
        return None
    for name, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            small = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4"
            )
            small.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            base.set_submodule(name, small.to(layer.weight.device))
    return base


def make_setting_base(setting: Setting, device: str) -> nn.Module | None:
    if device == "cpu":
        base = make_base(64, 96, 2, 4, device, torch.float32)
    else:
        base = make_base(4096, 11008, setting.blocks, 32, device, torch.bfloat16)
    return quantized(base) if setting.four_bit else base


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the table")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps in a turn (default 8)")
    parser.add_argument("--turns", type=int, default=3, help="of each method (default 3)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no setting after this time")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the settings to run, from 0")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend (default inductor)")
    parser.add_argument("--mode", help="torch.compile's mode, e.g. reduce-overhead, which replays CUDA graphs")
    parser.add_argument("--cpu", action="store_true", help="two settings of a small model, on the CPU")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    small = {"tokens": 32, "rank": 4, "blocks": 2}
    chosen = [Setting(methods=METHODS, **small), Setting(compiled=True, **small)]
    if not args.cpu:
        chosen = settings()
    chosen = [chosen[index] for index in args.only] if args.only else chosen
    device = "cpu" if args.cpu else "cuda"
    compiler = {"backend": args.compiler} | ({"mode": args.mode} if args.mode else {})
    where = f"{'CPU' if args.cpu else torch.cuda.get_device_name()}, torch {torch.__version__}"
    results: list[Result] = []
    kernels = []
    began = time.monotonic()
    for setting in chosen:
        if time.monotonic() - began > args.seconds:
            print(f"not begun within {args.seconds:.0f} s: {setting}", flush=True)
            continue
        base = make_setting_base(setting, device)
        if base is None:
            print(f"no bitsandbytes: {setting}", flush=True)
            continue
        rows, dearest = measure(base, setting, args.rounds, args.turns, compiler)
        results += rows
        kernels.append({"setting": asdict(setting), "kernels": dearest})
        print(table(rows), flush=True)
        text = json.dumps({"device": where, "results": [asdict(row) for row in results], "kernels": kernels}, indent=1)
        (args.out / "train_step.json").write_text(text)
        (args.out / "train_step.md").write_text(f"{where}\n\n{table(results)}")
        del base
        torch.compiler.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
