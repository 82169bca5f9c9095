"""Draw a run's layer metrics over its steps. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from doran_core.errors import CheckpointError, require
from doran_hf.diagnostics import LayerState

__all__ = ["plot_states"]

_MEASURES = {
    "tau": "tau",
    "norm": "row norm n",
    "scale": "output scale c",
    "effective_rank": "effective rank of BA",
    "gradient_orthogonal": "|G orthogonal|",
    "gradient_parallel": "|G parallel|",
    "gradient_parallel_kept": "|G parallel| kept",
}


def plot_states(states: Sequence[LayerState], path: str | Path, title: str = "") -> Path:
    """Draw one row of panels for each measure and one column for each kind of projection, a line for each layer.

    Args:
        states: from :func:`doran_hf.layer_table.read_states`.
        path: image to write; its suffix decides the format.
        title: of the figure.

    Returns:
        The path.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        CheckpointError: there is nothing to draw, or the image cannot be written.
    """
    require("matplotlib", package="doran-hf", extra="plot", purpose="drawing the layer metrics")
    import matplotlib
    from matplotlib.figure import Figure

    if not states:
        raise CheckpointError(f"nothing to draw for {path}: no layer metrics were recorded")
    layers = list(dict.fromkeys(state.layer for state in states))
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(layer.rpartition(".")[2], []).append(layer)
    measures = [name for name in _MEASURES if any(getattr(state, name) is not None for state in states)]
    figure = Figure(figsize=(3.6 * len(kinds) + 1, 2.4 * len(measures)), layout="constrained")
    axes: Any = figure.subplots(len(measures), len(kinds), squeeze=False, sharex=True, sharey="row")
    colours = matplotlib.colormaps["viridis"]
    for column, (kind, members) in enumerate(kinds.items()):
        axes[0, column].set_title(f"{kind} (first layer dark, last light)", fontsize="small")
        axes[-1, column].set_xlabel("step")
        for number, layer in enumerate(members):
            colour = colours(number / max(1, len(members) - 1) * 0.9)
            rows = [state for state in states if state.layer == layer]
            for axis, measure in zip(axes[:, column], measures, strict=True):
                _draw(axis, rows, measure, colour)
    for axis, measure in zip(axes[:, 0], measures, strict=True):
        axis.set_ylabel(_MEASURES[measure], fontsize="small")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return Path(path)


def _draw(axis: Any, rows: Sequence[LayerState], measure: str, colour: Any) -> None:
    known = [(row.step, getattr(row, measure)) for row in rows if getattr(row, measure) is not None]
    axis.plot([step for step, _ in known], [value for _, value in known], color=colour, linewidth=1, marker=".")
