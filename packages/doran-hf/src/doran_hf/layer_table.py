"""The parquet file of layer states: one row per adapted layer and logged step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from doran_core.errors import CheckpointError, require
from doran_hf.diagnostics import LayerState

__all__ = ["FILE_NAME", "read_states", "write_states"]

FILE_NAME = "layers.parquet"
"""Name of the file in a run's directory."""

_COLUMNS = [entry.name for entry in dataclasses.fields(LayerState)]


def _parquet() -> Any:
    return require("pyarrow.parquet", package="doran-hf", extra="train", purpose="the parquet file of layer metrics")


def write_states(path: str | Path, states: Sequence[LayerState]) -> None:
    """Write all rows atomically.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        CheckpointError: the file cannot be written.
    """
    parquet, path = _parquet(), Path(path)
    import pyarrow

    types = {"step": pyarrow.int64(), "layer": pyarrow.string()}
    table = pyarrow.table(
        {
            name: pyarrow.array([getattr(state, name) for state in states], types.get(name, pyarrow.float64()))
            for name in _COLUMNS
        }
    )
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, part)
        os.replace(part, path)  # noqa: PTH105  # this name says that it replaces
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def read_states(path: str | Path) -> list[LayerState]:
    """The rows of a file that :func:`write_states` wrote.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        CheckpointError: there is no such file, or it has other columns or another format.
    """
    parquet = _parquet()
    import pyarrow

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    missing = sorted(set(_COLUMNS) - set(table.column_names))
    if missing:
        raise CheckpointError(f"{path}: no columns {missing}; expected a file of layer metrics, as doran train writes")
    return [LayerState(**{name: row[name] for name in _COLUMNS}) for row in table.select(_COLUMNS).to_pylist()]
