"""Runs cases one after the other, each in a process of its own, and compares them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from doran_core.cli.tables import Table
from doran_core.errors import DoranError
from doran_serve.bench.cases import Case, Workload

__all__ = ["measure", "reason", "summary", "table"]

_QUIET = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # the log; results use the other pipe
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception): .+(?:\n  .+){0,3}")
"""The last line of a traceback, and pydantic's lines below it."""


def measure(case: Case, workload: Workload, limit: float | None = None) -> Iterator[dict[str, Any]]:
    """Run one case and yield its results as they come.

    Args:
        case: the engine.
        workload: its requests.
        limit: seconds before its processes are killed.

    Raises:
        DoranError: it ended without success; the first error of vLLM's log is in the message.
    """
    environment = _QUIET | os.environ
    if not case.plugin:
        environment["VLLM_PLUGINS"] = ""
    with tempfile.TemporaryDirectory() as folder:
        spec, log = Path(folder, "spec.json"), Path(folder, "log")
        spec.write_text(json.dumps({"case": case.to_dict(), "workload": vars(workload)}), encoding="utf-8")
        command = [sys.executable, "-m", "doran_serve.bench.child", str(spec)]
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
            alarm = threading.Timer(limit, _end, (process,)) if limit is not None else None
            try:
                if alarm is not None:
                    alarm.start()
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("RESULT "):
                        yield json.loads(line.removeprefix("RESULT "))
                code = process.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()
                _end(process)
        if code:
            raise DoranError(f"{case.name}: ended with {code}: {reason(log.read_text(encoding='utf-8'))}")


def reason(log: str) -> str:
    """The reason of an engine's end, from its log: the first error, or else the end of the log."""
    found = _ERROR.search(log)
    return found[0] if found else log[-3000:]


def _end(process: subprocess.Popen[str]) -> None:
    """End all processes of a case; vLLM starts several."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds: case to tokens_per_s and alone_ms_per_token."""
    rounds = [result for result in results if "tokens_per_s" in result]
    keys = ("tokens_per_s", "alone_ms_per_token")
    return {
        name: {key: statistics.median(r[key] for r in rounds if r["case"] == name) for key in keys}
        for name in dict.fromkeys(r["case"] for r in rounds)
    }


def table(medians: Mapping[str, Mapping[str, float]]) -> Table:
    """`summary` as a table, with ratios to the base and to LoRA where they were measured."""
    header = ["case", "tokens/s", "to base", "to LoRA", "alone, ms/token", "to base", "to LoRA"]
    rows = []
    for name, values in medians.items():
        cells = [name]
        for key, digits in (("tokens_per_s", 0), ("alone_ms_per_token", 2)):
            cells.append(f"{values[key]:.{digits}f}")
            for peer in ("base", "lora"):
                cells.append(f"{values[key] / medians[peer][key]:.3f}" if peer in medians else "-")
        rows.append(cells)
    return Table(header, rows)
