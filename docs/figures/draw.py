"""Draws the figures of the pages, each for a light and for a dark background.

    python docs/figures/draw.py

The concept pages' figures come from measurements.json, which measure.py makes. The first page's figures come from the
tables of docs/results. Figures are sized for a phone's width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

HERE = Path(__file__).parent
SCHEMES = {"light": "#222222", "dark": "#e6e6e6"}
BLUE, ORANGE, GREEN, GREY = "#4c72b0", "#dd8452", "#55a868", "#8c8c8c"


def main() -> None:
    measured = json.loads((HERE / "measurements.json").read_text())
    for scheme, ink in SCHEMES.items():
        with style(ink):
            gradient_split(measured["decoder"], scheme)
            tau_curves(measured["decoder"], scheme)
            tau_learned(measured["decoder"], scheme)
            sharing(measured["sharing"], scheme)
            start(measured["start"], scheme)
            gains(gained(), scheme)
            accuracy(compared(), scheme)


@contextmanager
def style(ink: str) -> Iterator[None]:
    """Ink for the scheme's background, which stays transparent; the same bytes from the same numbers."""
    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    fixed = {
        "font.size": 11,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
        "svg.hashsalt": "doran",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 10,
    }
    with pyplot.rc_context(fixed | dict.fromkeys(colours, ink)):
        yield


def save(figure: Any, name: str, scheme: str, numbers: str | None = None) -> None:
    """Write a figure; ``numbers`` are what it shows, as the file's description, for the test that compares them."""
    metadata = {"Date": None} | ({"Description": numbers} if numbers else {})
    figure.savefig(HERE / f"{name}-{scheme}.svg", transparent=True, bbox_inches="tight", metadata=metadata)
    pyplot.close(figure)


def gradient_split(decoder: dict[str, Any], scheme: str) -> None:
    """Per layer: the share of the squared gradient along the weight's rows, before and after tau's factor."""
    figure, axes = pyplot.subplots(2, 1, figsize=(4.6, 5.0), sharex=True, sharey=True)
    for axis, projection in zip(axes, ("q_proj", "v_proj"), strict=True):
        rows = [row for row in decoder["gradient"] if row["layer"].endswith(projection)]
        axis.semilogy([100 * row["along"] for row in rows], "o", color=BLUE, markersize=4.5, label="along the rows")
        axis.semilogy([100 * row["kept"] for row in rows], "s", color=ORANGE, markersize=4, label="of it, kept by tau")
        axis.axhline(100 / decoder["d_in"], color=GREY, linestyle="--", linewidth=1, label="a random direction")
        axis.set_title(projection, loc="left", fontsize=11)
        axis.set_ylabel("% of ||G||²")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=2, bbox_to_anchor=(0.54, 1.04))
    axes[1].set_xlabel("block")
    save(figure, "gradient-split", scheme)


def tau_curves(decoder: dict[str, Any], scheme: str) -> None:
    """Scale and gradient factor against the row norm, over the histogram of real row norms."""
    figure, axes = pyplot.subplots(2, 1, figsize=(4.6, 5.4), sharex=True)
    xs = [0.01 * i for i in range(2, 251)]
    for tau, colour in ((0.0, GREY), (0.1, BLUE), (0.5, ORANGE), (2.0, GREEN)):
        label = "tau = 0 (DoRA)" if tau == 0 else f"tau = {tau}"
        axes[0].plot(xs, [(1 + tau) / (x + tau) for x in xs], color=colour, label=label)
        axes[1].plot(xs, [tau / (x + tau) for x in xs], color=colour)
    axes[0].set_ylim(0, 8)
    axes[0].set_ylabel("scale c = m / (n + tau)")
    axes[0].legend(loc="upper right")
    axes[1].set_ylim(0, 1.02)
    axes[1].set_ylabel("kept: tau / (n + tau)")
    axes[1].set_xlabel("row norm n, in units of the mean")
    for axis in axes:
        behind = axis.twinx()
        edges = [0.05 * i for i in range(51)]
        behind.stairs(decoder["row_norms"]["counts"], edges, fill=True, color=GREY, alpha=0.3)
        behind.set_axis_off()
    save(figure, "tau-curves", scheme)


def tau_learned(decoder: dict[str, Any], scheme: str) -> None:
    """tau of each layer before and after the short training."""
    figure, axis = pyplot.subplots(figsize=(4.6, 3.2))
    for projection, colour in (("q_proj", BLUE), ("v_proj", ORANGE)):
        rows = [row for row in decoder["tau"] if row["layer"].endswith(projection)]
        changes = [100 * (row["last"] / row["first"] - 1) for row in rows]
        axis.plot(range(len(rows)), changes, marker="o", markersize=3.5, linewidth=1, color=colour, label=projection)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_xlabel("block")
    axis.set_ylabel("change of tau, %")
    axis.legend()
    save(figure, "tau-learned", scheme)


def sharing(measured: dict[str, Any], scheme: str) -> None:
    """How far every layer's factors move in a step through one layer."""
    figure, axes = pyplot.subplots(len(measured), 1, figsize=(4.2, 9.6))
    for axis, (kind, entry) in zip(axes, measured.items(), strict=True):
        names = [_short(name) for name in entry["layers"]]
        image = axis.imshow(entry["response"], cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f'sharing="{kind}"', loc="left", fontsize=11)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylabel("step through")
        axis.spines[:].set_visible(False)
        figure.colorbar(image, ax=axis, shrink=0.8)
    axes[-1].set_xlabel("layer that moves")
    figure.tight_layout()
    save(figure, "sharing", scheme)


def start(measured: dict[str, Any], scheme: str) -> None:
    """Singular values of the networks' features at the start, for the two starts."""
    figure, axis = pyplot.subplots(figsize=(4.2, 3.0))
    labels = {"normal": "N(0, 1)", "identity": "close to the identity"}
    for (kind, entry), colour in zip(measured.items(), (ORANGE, BLUE), strict=True):
        numbers = range(1, len(entry["mean"]) + 1)
        axis.plot(numbers, entry["mean"], marker="o", markersize=4, color=colour, label=labels[kind])
        axis.fill_between(numbers, entry["least"], entry["largest"], color=colour, alpha=0.25, linewidth=0)
    axis.set_yscale("log")
    axis.set_xlabel("singular value of H(0)")
    axis.set_ylabel("over the largest")
    axis.legend()
    save(figure, "start", scheme)


def gained() -> dict[str, dict[str, float]]:
    """The bars of the first page's figure, by panel, from the tables of docs/results."""
    steps = {row["method"]: row for row in _table("train-step-gpu.md", "## Numbers")}
    merges = {row["way"]: row for row in _table("merge.md", "All linear layers")}
    served = {row["case"]: row for row in _table("serving-gpu.md", "**Speed**")}
    methods = {"LoRA (PEFT)": "LoRA", "DoRA (PEFT)": "DoRA", "DoRAN": "DoRAN"}
    ways = {"PEFT": "PEFT, the same as DoRA", "doran": "doran, trainable DoRAN adapter"}
    servers = {"LoRA, stock vLLM": "LoRA, stock vLLM", "DoRAN, doran-serve": "DoRAN, mixed mode"}
    return {
        title: {label: float(rows[key][column].removesuffix(" MB").replace(",", "")) for label, key in bars.items()}
        for title, bars, rows, column in (
            ("Training step: time, x LoRA (less is better)", methods, steps, "minimum x LoRA"),
            ("Training step: memory, x LoRA (less is better)", methods, steps, "GiB x LoRA"),
            ("Merging a 4 GB model: memory, MB (less is better)", ways, merges, "memory above import"),
            ("Serving 8 adapters: tokens/s (more is better)", servers, served, "tokens/s"),
        )
    }


def gains(panels: dict[str, dict[str, float]], scheme: str) -> None:
    """Time, memory and throughput beside PEFT and stock vLLM."""
    heights = [len(bars) + 1 for bars in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(4.6, 0.36 * sum(heights)), gridspec_kw={"height_ratios": heights, "hspace": 0.55}
    )
    for axis, (title, bars) in zip(axes, panels.items(), strict=True):
        labels = list(bars)
        colours = [BLUE if "doran" in label.lower() else GREY for label in labels]
        drawn = axis.barh(labels, list(bars.values()), color=colours, height=0.7)
        axis.bar_label(drawn, [printed(value) for value in bars.values()], padding=4)
        axis.set_title(title, loc="left", fontsize=11)
        axis.invert_yaxis()
        axis.margins(x=0.16)
        axis.set_xticks([])
        axis.tick_params(left=False)
        axis.spines["bottom"].set_visible(False)
    save(figure, "gains", scheme)


TASKS = {
    "sample_efficiency": "sentiment, MiniLM",
    "smollm2": "sentiment, SmolLM2",
    "digits": "digits, small ViT",
    "flowers": "flowers, ViT-S/14",
    "textures": "textures, ViT-S/14",
    "cifar": "CIFAR-10, ViT-S/14",
    "commonsense_smollm2": "questions, SmolLM2",
    "commonsense_gemma3": "questions, Gemma 3",
}
"""What the studies are called in the figure."""
MEANS = {
    "texts and digits": "mean, texts and digits",
    "photos": "mean, photos",
    "commonsense questions": "mean, questions",
    "all but questions": "mean, all but questions",
    "all": "mean, all tasks",
}
"""What the means over groups of tasks are called there."""
LABELS = {"lora": "LoRA", "dora": "DoRA"}
COMPARED = {"doran": ("DoRAN", BLUE, "o"), "doran_old_start": ("DoRAN, old start", ORANGE, "s")}


def compared() -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """DoRAN's accuracy minus a reference's by reference, setting and arm: points, and half their interval."""
    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for reference in ("lora", "dora"):
        rows = {
            MEANS[row["tasks"]]: {arm: row[arm].partition(" (")[0] for arm in COMPARED}
            for row in _table("experiments/overall.md", f"## Minus {reference}, mean over tasks")
        }
        for row in _table("experiments/overall.md", f"## Minus {reference}, by setting"):
            study, _, share = row["setting"].partition(", ")
            rows[f"{TASKS[study]}, {share}"] = row
        panels[reference] = {
            setting: {arm: _interval(row[arm]) for arm in COMPARED if row[arm]} for setting, row in rows.items()
        }
    return panels


def _interval(cell: str) -> tuple[float, float]:
    value, _, half = cell.partition(" ± ")
    return float(value), float(half)


def accuracy(panels: dict[str, dict[str, dict[str, tuple[float, float]]]], scheme: str) -> None:
    """Differences of accuracy with their intervals, one row per setting."""
    settings = list(next(iter(panels.values())))
    means = sum(setting in MEANS.values() for setting in settings)
    figure, axes = pyplot.subplots(2, 1, figsize=(4.6, 0.54 * len(settings) + 1.6), sharex=True)
    for axis, (reference, rows) in zip(axes, panels.items(), strict=True):
        for shift, (arm, (label, colour, marker)) in zip((-0.15, 0.15), COMPARED.items(), strict=True):
            places = [place + shift for place, setting in enumerate(settings) if arm in rows[setting]]
            values, halves = zip(*(row[arm] for row in rows.values() if arm in row), strict=True)
            axis.errorbar(
                values,
                places,
                xerr=halves,
                fmt=marker,
                color=colour,
                markersize=3.8,
                capsize=2,
                linewidth=1.2,
                label=label,
            )
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.axhline(means - 0.5, color=GREY, linewidth=0.5, linestyle=":")
        axis.set_yticks(range(len(settings)), settings, fontsize=9)
        axis.set_title(f"minus {LABELS[reference]}", loc="left", fontsize=11)
        axis.set_ylim(len(settings) - 0.4, -0.6)
        axis.xaxis.set_major_locator(pyplot.MultipleLocator(2))
        axis.tick_params(labelbottom=True)
        axis.grid(axis="x", color=GREY, linewidth=0.3)
    axes[1].set_xlabel("points of test accuracy, 95% interval")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=2, bbox_to_anchor=(0.4, 0.99))
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    save(figure, "accuracy", scheme, told(panels))


def told(panels: dict[str, dict[str, dict[str, tuple[float, float]]]]) -> str:
    """The numbers of the figure's points."""
    return "; ".join(
        f"{LABELS[reference]}, {setting}, {COMPARED[arm][0]}: {value:+.2f} +- {half:.2f}"
        for reference, rows in panels.items()
        for setting, row in rows.items()
        for arm, (value, half) in row.items()
    )


def printed(value: float) -> str:
    """A bar's number: two decimals for a ratio, none for a quantity."""
    return f"{value:,.0f}" if value > 10 else f"{value:.2f}"


def _table(page: str, after: str) -> list[dict[str, str]]:
    """The first table of a results page after the given text: each row by the table's heads."""
    lines = (HERE.parent / "results" / page).read_text(encoding="utf-8").partition(after)[2].splitlines()
    rows = dropwhile(lambda line: not line.startswith("|"), lines)
    heads, _, *cells = (_cells(row) for row in takewhile(lambda line: line.startswith("|"), rows))
    return [dict(zip(heads, row, strict=True)) for row in cells]


def _cells(row: str) -> list[str]:
    return [cell.strip(" *") for cell in row.removeprefix("|").removesuffix("|").split("|")]


def _short(name: str) -> str:
    """ "q3" of "encoder.encoder.layer.3.attention.self.query"."""
    block = next(part for part in name.split(".") if part.isdecimal())
    return f"{name.rpartition('.')[2][0]}{block}"


if __name__ == "__main__":
    main()
