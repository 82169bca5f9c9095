"""The demo's report: a page, plots and the adapters in one directory."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.checks import TITLE, Checks


@dataclass
class Run:
    """What the report needs of one fine-tuning."""

    name: str
    model: Any
    losses: list[tuple[int, float]]
    tau: dict[str, tuple[float, float]]
    seconds: float
    metric: str = ""
    base_score: float = 0.0
    score: float = 0.0
    test_size: int = 0


def write_report(
    out: Path, runs: list[Run], adapters: dict[str, Path], checks: Checks, prompts: dict[str, list[str]],
    served: dict[str, list[list[int]]], tokenizer: Any, base_name: str, seconds: float,
) -> None:  # fmt: skip
    """report/: a page, plots and the adapters. Made beside it, then put in place of an earlier one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        plot_losses(runs, staging / "loss.png")
        plot_tau(runs, staging / "tau.png")
        plot_scores(runs, staging / "scores.png")
        for name, directory in adapters.items():
            shutil.copytree(directory, staging / "adapters" / name)
        scores = table(
            ("adapter", "metric", "unseen texts", "base", "DoRAN", "training"),
            [
                (r.name, r.metric, str(r.test_size), f"{r.base_score:.3f}", f"{r.score:.3f}", f"{r.seconds:.0f} s")
                for r in runs
            ],
        )
        proofs = table(
            ("check", "measured", "bound", "holds"), [(*row[:3], "yes" if row[3] else "NO") for row in checks.rows]
        )
        page = [
            TITLE, "",
            f"{base_name}, rank 8 on query and value, float32, {seconds / 60:.1f} minutes in all.", "",
            "## Unseen data", "", scores, "", "![accuracy and loss against the base](scores.png)", "",
            "![loss curves](loss.png)", "",
            "## tau per layer, before and after training", "", "![tau per layer](tau.png)", "",
            "## Reloaded, merged, ONNX and vLLM agree", "", proofs, "",
            "## What was served in one vLLM batch", "", *transcript(prompts, served, tokenizer), "",
        ]  # fmt: skip
        (staging / "README.md").write_text("\n".join(page), encoding="utf-8")
        staging.chmod(0o755)  # mkdtemp makes it private
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"\n{scores}\n\n{proofs}\n\n{out}/README.md, {seconds / 60:.1f} minutes in all")


def transcript(prompts: dict[str, list[str]], served: dict[str, list[list[int]]], tokenizer: Any) -> list[str]:
    lines = []
    for name, texts in prompts.items():
        for text, tokens in zip(texts, served[name], strict=True):
            lines += [f"**{name}**", "", "```text", f"{text} >>>{tokenizer.decode(tokens)}", "```", ""]
    return lines


def plot_losses(runs: list[Run], path: Path) -> None:
    figure, axes = new_figure(len(runs))
    for axis, run in zip(axes, runs, strict=True):
        steps, losses = zip(*run.losses, strict=True)
        axis.plot(steps, losses, color="tab:blue")
        axis.set(title=f"{run.name}: training loss", xlabel="step", ylabel="cross-entropy")
    figure.savefig(path, dpi=120)


def plot_tau(runs: list[Run], path: Path) -> None:
    figure, axes = new_figure(len(runs))
    for axis, run in zip(axes, runs, strict=True):
        for projection, color in (("q_proj", "tab:blue"), ("v_proj", "tab:orange")):
            values = [both for layer, both in run.tau.items() if layer.endswith(projection)]
            before, after = zip(*values, strict=True)
            axis.plot(before, color=color, linestyle=":", label=f"{projection} before")
            axis.plot(after, color=color, marker=".", label=f"{projection} after")
        axis.set(title=f"{run.name}: tau", xlabel="block", ylabel="tau")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_scores(runs: list[Run], path: Path) -> None:
    figure, axes = new_figure(len(runs))
    for axis, run in zip(axes, runs, strict=True):
        bars = axis.bar(["base", "DoRAN"], [run.base_score, run.score], color=["tab:gray", "tab:blue"])
        axis.bar_label(bars, fmt="%.3f")
        axis.set(
            title=f"{run.name}: {run.metric}, {run.test_size} unseen texts",
            ylim=(0, 1.15 * max(run.base_score, run.score)),
        )
    figure.savefig(path, dpi=120)


def new_figure(columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5 * columns, 3.5), layout="constrained")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table that reads well in a terminal, too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in lines)
