"""From results folders to one tidy table per study, and the curves of the runs that its figures show."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas

from experiments.errors import ExperimentError
from experiments.store import Store
from experiments.study import Study

__all__ = [
    "CURVE_COLUMNS",
    "KEYS",
    "SHARE_COLUMNS",
    "SPECTRUM_COLUMNS",
    "chosen_rates",
    "collect",
    "known_runs",
    "searched",
]

KEYS = ["arm", "model", "method", "options", "fraction", "rate", "seed", "steps", "batch"]
"""First columns of a table; the measures follow."""
CURVE_COLUMNS = ["arm", "rate", "seed", "layer", "step", "tau", "norm"]
SHARE_COLUMNS = ["along", "kept"]
"""Further columns of runs whose gradients were split: shares of the squared gradient."""
SPECTRUM_COLUMNS = ["arm", "rate", "seed", "layer", "index", "value"]
_NOT_TIDY = ("curves",)


def collect(study: Study, folders: Sequence[Path], into: Path) -> Path:
    """Write ``STUDY.csv``, a row per run, and ``STUDY.tau.parquet``, tau by layer and step at each arm's chosen rate.

    Where the factors were measured, also ``STUDY.spectra.parquet``, the singular values of their updates there.

    Runs that the folders do not have are taken from the tables in ``into``, this study's or another's.

    Args:
        study: which runs.
        folders: results; of a run that several have, the first one's.
        into: folder of the tables.

    Returns:
        The table's path.

    Raises:
        ExperimentError: no run of the study is there.
    """
    path, curves_path = into / f"{study.name}.csv", into / f"{study.name}.tau.parquet"
    spectra_path = into / f"{study.name}.spectra.parquet"
    found: dict[str, tuple[Store, dict[str, Any]]] = {}
    for store in [Store(folder) for folder in reversed(folders)]:
        found.update({id_: (store, row) for id_, row in store.rows().items()})
    table = _table(study, {id_: row for id_, (_, row) in found.items()}, _earlier_rows(into))
    if table.empty:
        raise ExperimentError(f"study {study.name}: none of its runs is in {', '.join(map(str, folders))}")
    curves = _tau_curves(table, found, curves_path)
    spectra = _spectra(table, found, spectra_path)
    into.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    if len(spectra):
        spectra.to_parquet(spectra_path, index=False)
    if len(curves):
        curves.to_parquet(curves_path, index=False)
    return path


def searched(study: Study, folder: Path, tables: Path | None = None) -> Study:
    """The study at the rates that its runs so far choose: those with the most seeds, and of these the most accurate.

    Args:
        study: which runs.
        folder: results.
        tables: folder of tidy tables, whose runs count as well.
    """
    table = _table(study, Store(folder).rows(), _earlier_rows(tables) if tables else {})
    return study.at_rates(chosen_rates(table) if len(table) else {})


def _table(
    study: Study, found: Mapping[str, dict[str, Any]], earlier: Mapping[str, dict[str, Any]]
) -> pandas.DataFrame:
    """A row for each run of the study that is in ``found`` (by its id) or, if not there, in ``earlier``."""
    records = []
    for arm, run in study.runs():
        if run.id in found:
            measures = {key: value for key, value in found[run.id].items() if key not in _NOT_TIDY}
        elif run.id in earlier:
            measures = {key: value for key, value in earlier[run.id].items() if key not in KEYS}
        else:
            continue
        options = " ".join(f"{key}={value}" for key, value in run.options)
        spec = {key: getattr(run, key) for key in KEYS if key not in ("arm", "options")}
        records.append({"arm": arm, "options": options, **spec, **measures})
    columns = dict.fromkeys(name for record in records for name in record if name not in KEYS)
    return pandas.DataFrame(records, columns=[*KEYS, *columns])


def _earlier_rows(folder: Path) -> dict[str, dict[str, Any]]:
    tables = [pandas.read_csv(path, keep_default_na=True) for path in sorted(folder.glob("*.csv"))]
    return {row["id"]: row for table in tables if "id" in table for row in table.to_dict("records")}


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


def _tau_curves(
    table: pandas.DataFrame, found: dict[str, tuple[Store, dict[str, Any]]], earlier: Path
) -> pandas.DataFrame:
    """Rows of :data:`CURVE_COLUMNS` for the runs on all of their data with a tau, at the chosen rates."""
    known = pandas.read_parquet(earlier) if earlier.is_file() else pandas.DataFrame(columns=CURVE_COLUMNS)
    parts, missing = [], 0
    chosen = chosen_rates(table)
    for row in table.itertuples():
        whole = row.fraction == table.fraction.max()
        if not whole or row.rate != chosen[row.arm, row.fraction] or not getattr(row, "tau_start", 0.0) > 0.0:
            continue
        recorded = found[row.id][0].curves_of(found[row.id][1]) if row.id in found else None
        if recorded is None:
            own = known[(known.arm == row.arm) & (known.rate == row.rate) & (known.seed == row.seed)]
            missing += own.empty
            parts.append(own.astype({"layer": str}))
            continue
        curves, points, layers = recorded
        steps, names = len(points), len(layers)
        parts.append(
            pandas.DataFrame({
                "arm": row.arm, "rate": row.rate, "seed": row.seed, "layer": layers * steps,
                "step": points.repeat(names).astype("int32"),
                "tau": curves["tau"].ravel(), "norm": curves["norm"].ravel(),
                **{name: curves[name].ravel() for name in SHARE_COLUMNS if name in curves},
            })
        )  # fmt: skip
    if missing:
        print(f"{missing} run(s) have no curves in the results folder; their tau is not in the table", file=sys.stderr)
    return pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame(columns=CURVE_COLUMNS)


def _spectra(
    table: pandas.DataFrame, found: dict[str, tuple[Store, dict[str, Any]]], earlier: Path
) -> pandas.DataFrame:
    """Singular values of each layer's update at the chosen rates; ``index`` counts them from the largest."""
    known = pandas.read_parquet(earlier) if earlier.is_file() else pandas.DataFrame(columns=SPECTRUM_COLUMNS)
    parts = []
    chosen = chosen_rates(table)
    for row in table.itertuples():
        if row.rate != chosen[row.arm, row.fraction]:
            continue
        recorded = found[row.id][0].curves_of(found[row.id][1]) if row.id in found else None
        if recorded is None:
            own = known[(known.arm == row.arm) & (known.rate == row.rate) & (known.seed == row.seed)]
            parts += [own] if len(own) else []
            continue
        if "spectrum" not in recorded[0]:
            continue
        values, layers = recorded[0]["spectrum"], recorded[2]
        count = values.shape[1]
        parts.append(
            pandas.DataFrame({
                "arm": row.arm, "rate": row.rate, "seed": row.seed,
                "layer": [layer for layer in layers for _ in range(count)],
                "index": list(range(count)) * len(layers), "value": values.ravel(),
            })
        )  # fmt: skip
    return pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame(columns=SPECTRUM_COLUMNS)


def known_runs(folder: Path) -> set[str]:
    """Ids of all runs in the tidy tables of a folder.

    Raises:
        ExperimentError: there is no table.
    """
    ids: set[str] = set()
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise ExperimentError(f"{folder} has no table of runs (STUDY.csv)")
    for path in paths:
        table = pandas.read_csv(path)
        if "id" in table:
            ids |= set(table["id"])
    return ids
