"""Figures of a study: accuracy over the learning rate and over the data, and where tau goes in each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas

from experiments.statistics import mean_interval
from experiments.tables import at_chosen_rates

__all__ = ["plot_data", "plot_rates", "plot_spectra", "plot_split", "plot_tau", "plot_theory"]

_INK = "#808080"
"""A grey that can be read on light and dark pages: the figures are transparent."""
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same drawing gives the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "experiments", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3}
    matplotlib.rcParams |= dict.fromkeys(_INKED, _INK) | {"legend.frameon": False, "savefig.transparent": True}
    return pyplot


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    _pyplot().close(figure)
    return path


def _curve(axis: Any, rows: pandas.DataFrame, x: str, label: str, style: str) -> None:
    grouped = [(value, mean_interval((100 * part.test_accuracy).tolist())) for value, part in rows.groupby(x)]
    places = [value for value, _ in grouped]
    means = [interval.value for _, interval in grouped]
    halves = [interval.half for _, interval in grouped]
    axis.errorbar(places, means, yerr=halves, label=label, marker=".", capsize=2, linewidth=1, linestyle=style)


def _dashes(number: int) -> str:
    """Line style of an arm, by its number: matplotlib has ten colours."""
    return "-" if number < 10 else "--"


def _lines(axis: Any, table: pandas.DataFrame, x: str) -> None:
    for number, arm in enumerate(table.arm.drop_duplicates()):
        _curve(axis, table[table.arm == arm], x, str(arm), _dashes(number))
    axis.set(xscale="log", ylabel="test accuracy, % (95% t interval)")
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def plot_rates(table: pandas.DataFrame, path: Path) -> Path:
    """Accuracy on all of the data over the learning rate."""
    figure, axis = _pyplot().subplots(figsize=(7, 3.8), layout="constrained")
    _lines(axis, table[table.fraction == table.fraction.max()], "rate")
    axis.set(xlabel="peak learning rate")
    return _save(figure, path)


def plot_data(table: pandas.DataFrame, path: Path) -> Path:
    """Accuracy over the share of the data, at the rates chosen for each."""
    figure, axis = _pyplot().subplots(figsize=(7, 3.8), layout="constrained")
    _lines(axis, at_chosen_rates(table), "fraction")
    axis.set(xlabel="share of the training data")
    return _save(figure, path)


def plot_tau(curves: pandas.DataFrame, arm: str, path: Path) -> Path:
    """tau of each layer over the steps in units of the row norm, the mean over seeds, and its last value per layer."""
    own = curves[curves.arm == arm].copy()
    own["relative"] = own.tau / own.norm
    own["projection"] = own.layer.astype(str).str.rpartition(".")[2]
    own["block"] = own.layer.astype(str).str.extract(r"(\d+)")[0].astype(int)
    figure, axes = _pyplot().subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    colours = dict(zip(sorted(own.projection.unique()), ("tab:blue", "tab:orange", "tab:green"), strict=False))
    last = own[own.step == own.step.max()]
    for projection, colour in colours.items():
        part = own[own.projection == projection]
        for _, layer in part.groupby("block"):
            line = layer.groupby("step").relative.mean()
            axes[0].plot(line.index, line.to_numpy(), color=colour, linewidth=0.8, alpha=0.7)
        ends = last[last.projection == projection]
        axes[1].plot(ends.block, ends.relative, ".", color=colour, markersize=4, label=projection)
    axes[0].set(xlabel="step", ylabel="tau / mean row norm", title="each layer, mean over seeds")
    axes[1].set(xlabel="block", title="last step, each seed")
    axes[1].legend(fontsize=9)
    return _save(figure, path)


def plot_split(curves: pandas.DataFrame, arm: str, path: Path) -> Path:
    """Share of each layer's squared gradient along its weight's rows, and what tau keeps of it, by block."""
    own = curves[curves.arm == arm].dropna(subset=["along"]).copy()
    own["projection"] = own.layer.astype(str).str.rpartition(".")[2]
    own["block"] = own.layer.astype(str).str.extract(r"(\d+)")[0].astype(int)
    figure, axis = _pyplot().subplots(figsize=(7, 3.4), layout="constrained")
    for projection, part in own.groupby("projection"):
        means = 100 * part.groupby("block")[["along", "kept"]].mean()
        (line,) = axis.plot(means.index, means.along, "o", markersize=4, label=f"{projection}: along the rows")
        axis.plot(means.index, means.kept, "x", markersize=4, color=line.get_color(), label="of it, kept by tau")
    axis.set(yscale="log", xlabel="block", ylabel="% of the squared gradient", title="mean over steps and seeds")
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)


def plot_spectra(spectra: pandas.DataFrame, path: Path) -> Path:
    """Singular values of the updates over the largest of their layer, the mean over layers and seeds."""
    figure, axis = _pyplot().subplots(figsize=(7, 3.4), layout="constrained")
    largest = spectra.groupby(["arm", "seed", "layer"], observed=True).value.transform("max")
    relative = spectra.assign(relative=spectra.value / largest)
    for number, arm in enumerate(spectra.arm.drop_duplicates()):
        line = relative[relative.arm == arm].groupby("index").relative.mean()
        axis.plot(line.index + 1, line.to_numpy(), _dashes(number), marker=".", label=str(arm))
    axis.set(yscale="log", xlabel="singular value, from the largest", ylabel="over the largest", ylim=(1e-4, 1.5))
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)


def plot_theory(table: pandas.DataFrame, path: Path) -> Path:
    """Median errors over the samples, shared against separate factors."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for (family, fitted), part in table.groupby(["family", "fitted_experts"]):
        for axis, name in zip(axes, ("function_error", "factor_error"), strict=True):
            middle = part.groupby("samples")[name].median()
            style = "-" if family == "shared" else "--"
            axis.plot(middle.index, middle.to_numpy(), style, marker=".", label=f"{family}, {fitted} experts fitted")
            axis.set(xscale="log", yscale="log", xlabel="samples", title=name.replace("_", " ") + ", median")
            axis.set_xticks(middle.index, labels=[str(samples) for samples in middle.index])
            axis.set_xticks([], minor=True)
    axes[0].legend(fontsize=9)
    return _save(figure, path)
