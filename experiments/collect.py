"""From results folders to one tidy table per study, and the curves of the runs that its figures show."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from experiments.errors import ExperimentError
from experiments.store import Store
from experiments.study import Study

__all__ = ["CURVE_COLUMNS", "KEYS", "chosen_rates", "collect"]

KEYS = ["arm", "model", "method", "options", "fraction", "rate", "seed", "steps", "batch"]
"""First columns of a table; the measures follow."""
CURVE_COLUMNS = ["arm", "rate", "seed", "layer", "step", "tau", "norm"]
_NOT_TIDY = ("curves",)


def collect(study: Study, folders: Sequence[Path], into: Path) -> Path:
    """Write ``STUDY.csv``, a row per run, and ``STUDY.tau.parquet``, tau by layer and step at each arm's chosen rate.

    Args:
        study: which runs.
        folders: results; of a run that several have, the first one's.
        into: folder of the tables.

    Returns:
        The table's path.

    Raises:
        ExperimentError: no run of the study is there.
    """
    stores = [Store(folder) for folder in folders]
    found: dict[str, tuple[Store, dict[str, Any]]] = {}
    for store in reversed(stores):
        found.update({id_: (store, row) for id_, row in store.rows().items()})
    records = []
    for arm, run in study.runs():
        if run.id not in found:
            continue
        options = " ".join(f"{key}={value}" for key, value in run.options)
        spec = {"arm": arm, "options": options} | {key: getattr(run, key) for key in KEYS if hasattr(run, key)}
        spec["options"] = options
        measures = {key: value for key, value in found[run.id][1].items() if key not in _NOT_TIDY}
        records.append({**spec, **measures})
    if not records:
        raise ExperimentError(f"study {study.name}: none of its runs is in {', '.join(map(str, folders))}")
    table = pandas.DataFrame(records)
    table = table[[*KEYS, *(name for name in table.columns if name not in KEYS)]]
    into.mkdir(parents=True, exist_ok=True)
    path = into / f"{study.name}.csv"
    table.to_csv(path, index=False)
    curves = _tau_curves(table, found)
    if len(curves):
        curves.to_parquet(into / f"{study.name}.tau.parquet", index=False)
    return path


def chosen_rates(table: pandas.DataFrame) -> dict[tuple[str, float], float]:
    """For each arm and share of the data, the rate of the best mean validation accuracy over the seeds.

    Rates that not all of the arm's seeds have been run at are left out, unless there are no others.
    """
    chosen = {}
    for (arm, fraction), part in table.groupby(["arm", "fraction"]):
        by_rate = part.groupby("rate").validation_accuracy.agg(["mean", "size"])
        full = by_rate[by_rate["size"] == by_rate["size"].max()]
        chosen[str(arm), float(fraction)] = float(full["mean"].idxmax())
    return chosen


def _tau_curves(table: pandas.DataFrame, found: dict[str, tuple[Store, dict[str, Any]]]) -> pandas.DataFrame:
    """Rows of :data:`CURVE_COLUMNS` for the runs on all of their data with a tau, at the chosen rates."""
    parts, missing = [], 0
    chosen = chosen_rates(table)
    for row in table.itertuples():
        whole = row.fraction == table.fraction.max()
        if not whole or row.rate != chosen[row.arm, row.fraction] or not getattr(row, "tau_start", 0.0) > 0.0:
            continue
        recorded = found[row.id][0].curves_of(found[row.id][1])
        if recorded is None:
            missing += 1
            continue
        curves, points, layers = recorded
        steps, names = len(points), len(layers)
        parts.append(
            pandas.DataFrame({
                "arm": row.arm, "rate": row.rate, "seed": row.seed,
                "layer": pandas.Categorical(layers * steps), "step": points.repeat(names).astype("int32"),
                "tau": curves["tau"].ravel(), "norm": curves["norm"].ravel(),
            })
        )  # fmt: skip
    if missing:
        print(f"{missing} run(s) have no curves in the results folder; their tau is not in the table", file=sys.stderr)
    return pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame(columns=CURVE_COLUMNS)
