"""`doran inspect`: shows what is in an adapter directory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from doran_core.cli.command import Outcome, command
from doran_core.cli.options import DIRECTORY, FILE, adapter_options, load_factor_builder
from doran_core.cli.tables import Table

if TYPE_CHECKING:
    from doran_core.diagnostics.inspect import AdapterReport, LayerReport, Spread
    from doran_core.diagnostics.similarity import LayerSimilarity

__all__ = ["inspect"]


@command(
    group="adapters",
    short_help="show what is in an adapter",
    examples=(
        "doran inspect run/adapter",
        "doran inspect run/adapter --base base --plot adapter.png",
        "doran inspect run/adapter --json | jq '.layers[] | [.name, .effective_rank]'",
    ),
)
@click.argument("adapter", metavar="ADAPTER_DIR", type=DIRECTORY)
@click.option("--base", type=DIRECTORY, help="Base checkpoint of the adapter.")
@click.option("--plot", type=FILE, help="Draw the report, e.g. out.png (needs matplotlib).")
@adapter_options
def inspect(
    adapter: str, base: str | None, plot: str | None, allow_base_mismatch: bool, factor_builder: str | None
) -> Outcome:
    """Check an adapter of any form and show its layers: sizes, tau, output scale, effective rank. With --base, also
    show what depends on the base weights, and check that the base is the right one.
    """
    from doran_core.diagnostics.inspect import inspect_adapter
    from doran_core.diagnostics.plot import plot_report, require_plotting

    if plot:
        require_plotting()
    report = inspect_adapter(
        adapter,
        base,
        allow_base_mismatch=allow_base_mismatch,
        factor_builder=load_factor_builder(factor_builder),
    )
    if plot:
        plot_report(report, plot)
    shown: list[str | Table] = [_summary(report), "", _layer_table(report.layers)]
    if report.similarities:
        shown += ["", _similarity_table(report.similarities)]
    return Outcome(report.to_dict(), shown)


def _summary(report: AdapterReport) -> Table:
    ranks = sorted({layer.rank for layer in report.layers})
    facts = {
        "adapter": report.directory,
        "form": report.form,
        "made by": report.created_by,
        "base model": report.base_model,
        "base weights": report.base_fingerprint,
        "task": report.task_type,
        "layers": f"{len(report.layers)}, rank {', '.join(map(str, ranks))}",
        "parameters": f"{report.parameters:,}",
        "full tensors": ", ".join(report.extra) or None,
    }
    return Table([], [[name, value] for name, value in facts.items() if value is not None])


def _layer_table(layers: Sequence[LayerReport]) -> Table:
    columns = {
        "d_out x d_in": [f"{layer.d_out} x {layer.d_in}" for layer in layers],
        "rank": [str(layer.rank) for layer in layers],
        "eff. rank": [f"{layer.effective_rank:.2f}" for layer in layers],
        "largest sv": [f"{layer.singular_values[0]:.3g}" for layer in layers],
        "tau": [_spread(layer.tau) for layer in layers],
        "scale c": [_spread(layer.scale) for layer in layers],
        "norm n": [_spread(layer.norm) for layer in layers],
        "tau/(n+tau)": [_number(layer.tau_share) for layer in layers],
        "change": [_number(layer.change) for layer in layers],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    rows = [[layer.name, *(cells[index] for cells in shown.values())] for index, layer in enumerate(layers)]
    return Table(["layer", *shown], rows)


def _similarity_table(similarities: Sequence[LayerSimilarity]) -> Table:
    header = ["cosine between layers", "layers", "mean", "least", "largest"]
    rows = []
    for group in similarities:
        others = [value for i, row in enumerate(group.update) for j, value in enumerate(row) if i != j]
        numbers = (group.mean_update(), min(others), max(others))
        rows.append([f"B A of {group.projection}", str(len(group.layers)), *(f"{number:.3f}" for number in numbers)])
    return Table(header, rows)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if spread.least == spread.largest:
        return f"{spread.mean:.4g}"
    return f"{spread.mean:.4g} ({spread.least:.3g} to {spread.largest:.3g})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
