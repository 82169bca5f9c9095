"""The results folder: one JSON line per finished run, and the curves of each stack of runs beside them.

    DIR/runs.jsonl           one line per run, appended in one write
    DIR/curves/STACK.npz     written before the lines of its runs, so that a line's curves are always there

A folder can be carried to another machine and back: a run is known by its id, and never run again.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import ExperimentError
from experiments.train import Outcome

__all__ = ["Store"]


class Store:
    """A results folder.

    Args:
        folder: made when the first result comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "runs.jsonl"
        self.curves = folder / "curves"

    def rows(self) -> dict[str, dict[str, Any]]:
        """All finished runs by their ids.

        Raises:
            ExperimentError: a line that is no record, named. A last line without an end is a write that was cut
                off, and is left out.
        """
        if not self.file.is_file():
            return {}
        text = self.file.read_text(encoding="utf-8")
        rows = {}
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                rows[row["id"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ExperimentError(f"{self.file}, line {number}: not a run's record: {error}") from error
        return rows

    def add(self, outcome: Outcome) -> None:
        """Append a finished stack: its curves, then its rows in one write."""
        self.curves.mkdir(parents=True, exist_ok=True)
        name = outcome.rows[0]["id"]
        ids = np.array([row["id"] for row in outcome.rows])
        curves = {key: _narrow(value) for key, value in outcome.curves.items()}
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"ids": ids, "points": outcome.points, "layers": np.array(outcome.layers), **curves}
        np.savez_compressed(buffer, **arrays)
        part = self.curves / f".{name}.{os.getpid()}"
        part.write_bytes(buffer.getvalue())
        part.rename(self.curves / f"{name}.npz")
        self._append({**row, "curves": name} for row in outcome.rows)

    def _append(self, rows: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _end_last_line(self.file, file)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def curves_of(self, row: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]] | None:
        """A run's curves, the steps at which tau was recorded, and the layers' names; None if their file is gone."""
        file = self.curves / f"{row['curves']}.npz"
        if not file.is_file():
            return None
        with np.load(file) as stack:
            k = int(np.flatnonzero(stack["ids"] == row["id"])[0])
            own = {key: stack[key][k].astype(np.float32) for key in stack.files if key not in _OF_THE_STACK}
            return own, stack["points"], stack["layers"].tolist()


_OF_THE_STACK = ("ids", "points", "layers")


def _narrow(values: np.ndarray) -> np.ndarray:
    """Curves in float16 unless they leave its range: three digits are more than a plot shows."""
    finite = values[np.isfinite(values)]
    fits = finite.size == 0 or (np.abs(finite).max() < 6e4 and np.abs(finite[finite != 0]).min(initial=1.0) > 1e-4)
    return values.astype(np.float16 if fits else np.float32)


def _end_last_line(path: Path, file: Any) -> None:
    """Cut off what a killed write left of a line."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)
