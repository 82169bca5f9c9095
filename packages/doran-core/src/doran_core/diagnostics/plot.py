"""Draw an adapter report: what was learned in each layer, layer by layer. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from doran_core.diagnostics.inspect import AdapterReport, LayerReport, Spread
from doran_core.errors import CheckpointError, require
from doran_core.files import StrPath

__all__ = ["plot_report", "require_plotting"]


def require_plotting() -> None:
    """Raise before any work is done if there is nothing to draw with.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", package="doran-core", extra="plot", purpose="drawing the adapter")


def plot_report(report: AdapterReport, path: StrPath) -> Path:
    """Draw tau, output scale, effective rank and spectrum over the layers, one line per kind of projection.

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

    groups: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        groups.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    panels = [panel for panel in _PANELS if any(panel[1](layer) is not None for layer in report.layers)]
    figure = Figure(figsize=(9.0, 2.6 * (len(panels) + 1)), layout="constrained")
    axes = figure.subplots(len(panels) + 1, 1, squeeze=False)[:, 0]
    for axis, (title, value) in zip(axes, panels, strict=False):
        _draw_lines(axis, title, value, groups)
    _draw_spectra(axes[-1], groups)
    figure.suptitle(f"{Path(report.directory).name} ({report.form}, {len(report.layers)} layers)")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return Path(path)


def _spread_of(name: str) -> Callable[[LayerReport], Spread | None]:
    return lambda layer: getattr(layer, name)


_PANELS: list[tuple[str, Callable[[LayerReport], Spread | float | None]]] = [
    ("tau", _spread_of("tau")),
    ("output scale c", _spread_of("scale")),
    ("row norm n", _spread_of("norm")),
    ("effective rank of BA", lambda layer: layer.effective_rank),
    ("relative change of the weight", lambda layer: layer.change),
]


def _draw_lines(
    axis: Any, title: str, value: Callable[[LayerReport], Spread | float | None], groups: dict[str, list[LayerReport]]
) -> None:
    for name, layers in groups.items():
        known = [(index, found) for index, layer in enumerate(layers) if (found := value(layer)) is not None]
        positions = [index for index, _ in known]
        means = [found.mean if isinstance(found, Spread) else found for _, found in known]
        (line,) = axis.plot(positions, means, marker=".", label=name)
        spreads = [found for _, found in known if isinstance(found, Spread)]
        if spreads:
            axis.fill_between(
                positions,
                [spread.least for spread in spreads],
                [spread.largest for spread in spreads],
                color=line.get_color(),
                alpha=0.15,
            )
    axis.set_ylabel(title)
    axis.set_xlabel("adapted layer")
    axis.legend(fontsize="small")


def _draw_spectra(axis: Any, groups: dict[str, list[LayerReport]]) -> None:
    for number, (name, layers) in enumerate(groups.items()):
        for index, layer in enumerate(layers):
            values = [value for value in layer.singular_values if value > 0]
            label = name if index == 0 else None
            axis.semilogy(range(1, len(values) + 1), values, color=f"C{number}", alpha=0.5, label=label)
    axis.set_ylabel("singular values of BA")
    axis.set_xlabel("index")
    axis.legend(fontsize="small")
