"""Draw an adapter report by block, with one line per kind of projection. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from doran_core.diagnostics.inspect import AdapterReport, LayerReport, Spread
from doran_core.diagnostics.similarity import LayerSimilarity
from doran_core.errors import CheckpointError, require
from doran_core.files import StrPath
from doran_core.method.sharing import block_of

__all__ = ["plot_report", "require_plotting"]


def require_plotting() -> None:
    """Raise before any work is done if matplotlib is missing.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", package="doran-core", extra="plot", purpose="drawing the adapter")


def plot_report(report: AdapterReport, path: StrPath) -> Path:
    """Draw tau, output scale, norm, effective rank, change and spectrum, as far as the report has them.

    A line shows the mean of each layer, its band the least and largest value. In the spectrum, the line is the median
    layer, and the band covers all layers.

    Args:
        report: from :func:`~doran_core.diagnostics.inspect_adapter`.
        path: image to write; its suffix decides the format.

    Returns:
        The path.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        CheckpointError: the image cannot be written.
    """
    require_plotting()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    groups = _by_projection(report.layers)
    panels = [panel for panel in _PANELS if any(panel[1](layer) is not None for layer in report.layers)]
    drawn = len(panels) + 1 + bool(report.similarities)
    rows = math.ceil(drawn / 2)
    figure = Figure(figsize=(10.0, 0.8 + 2.7 * rows), layout="constrained")
    axes: list[Any] = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axis, (title, value) in zip(axes, panels, strict=False):
        _draw_layers(axis, value, groups)
        axis.set_title(title, fontsize="medium", loc="left")
        axis.set_xlabel("block")
    _draw_spectra(axes[len(panels)], groups)
    if report.similarities:
        _draw_similarities(axes[len(panels) + 1], report.similarities)
    for axis in axes[:drawn]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[drawn:]:
        axis.remove()
    figure.suptitle(f"{Path(report.directory).resolve().name}: {report.form}, {len(report.layers)} layers")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return Path(path)


def _spread_of(name: str) -> Callable[[LayerReport], Spread | None]:
    return lambda layer: getattr(layer, name)


_PANELS: list[tuple[str, Callable[[LayerReport], Spread | float | None]]] = [
    ("tau", _spread_of("tau")),
    ("output scale c", _spread_of("scale")),
    ("row norm n of W0 + g B A", _spread_of("norm")),
    ("effective rank of B A", lambda layer: layer.effective_rank),
    ("change of the weight, |W' - W0| / |W0|", lambda layer: layer.change),
]


def _by_projection(layers: list[LayerReport]) -> dict[str, list[tuple[int, LayerReport]]]:
    """Layers by the last part of their names, numbered from 0 in the given order."""
    blocks: dict[str, int] = {}
    groups: dict[str, list[tuple[int, LayerReport]]] = {}
    for layer in layers:
        number = blocks.setdefault(block_of(layer.name) or layer.name, len(blocks))
        groups.setdefault(layer.name.rpartition(".")[2], []).append((number, layer))
    if any(len({number for number, _ in group}) < len(group) for group in groups.values()):
        return {"layers": list(enumerate(layers))}  # several layers of a block have the same last part
    return groups


def _draw_layers(
    axis: Any,
    value: Callable[[LayerReport], Spread | float | None],
    groups: dict[str, list[tuple[int, LayerReport]]],
) -> None:
    for name, layers in groups.items():
        known = [(number, found) for number, layer in layers if (found := value(layer)) is not None]
        numbers = [number for number, _ in known]
        means = [found.mean if isinstance(found, Spread) else found for _, found in known]
        (line,) = axis.plot(numbers, means, marker="o", markersize=3, linewidth=1.2, label=name)
        spreads = [found for _, found in known if isinstance(found, Spread)]
        if any(spread.least < spread.largest for spread in spreads):
            least, largest = [spread.least for spread in spreads], [spread.largest for spread in spreads]
            axis.fill_between(numbers, least, largest, color=line.get_color(), alpha=0.12, linewidth=0)


def _draw_spectra(axis: Any, groups: dict[str, list[tuple[int, LayerReport]]]) -> None:
    for name, layers in groups.items():
        ranks = min(len(layer.singular_values) for _, layer in layers)
        values = [sorted(layer.singular_values[index] for _, layer in layers) for index in range(ranks)]
        positions = range(1, ranks + 1)
        (line,) = axis.plot(positions, [row[len(row) // 2] for row in values], marker="o", markersize=3, label=name)
        least, largest = [row[0] for row in values], [row[-1] for row in values]
        axis.fill_between(positions, least, largest, color=line.get_color(), alpha=0.12, linewidth=0)
    if any(layer.singular_values[0] > 0 for layers in groups.values() for _, layer in layers):
        axis.set_yscale("log")
    axis.set_title("singular values of g B A", fontsize="medium", loc="left")
    axis.set_xlabel("index")


def _draw_similarities(axis: Any, similarities: Sequence[LayerSimilarity]) -> None:
    """The mean cosine between the updates of layers, by their distance in layers."""
    for group in similarities:
        distances = range(1, len(group.layers))
        means = [
            sum(group.update[i][i + distance] for i in range(len(group.layers) - distance))
            / (len(group.layers) - distance)
            for distance in distances
        ]
        axis.plot(distances, means, marker="o", markersize=3, linewidth=1.2, label=group.projection)
    axis.axhline(0.0, color="grey", linewidth=0.8)
    axis.set_title("cosine of B A between two layers", fontsize="medium", loc="left")
    axis.set_xlabel("layers apart")
