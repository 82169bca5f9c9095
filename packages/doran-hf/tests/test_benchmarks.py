"""The benchmarks of a step and of generation run, in their short form on the CPU, and write what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SHORT = {
    "train_step": ["--cpu", "--rounds", "1", "--turns", "1", "--compiler", "aot_eager", "--only", "0"],
    "generate": ["--cpu", "--small", "--tokens", "4", "--turns", "1"],
}


@pytest.mark.parametrize("name", SHORT)
def test_the_short_form_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--out", str(tmp_path), *SHORT[name]]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    assert {row["method"] for row in found} >= {"LoRA", "DoRA", "DoRAN", "DoRAN static"}
    assert all(row["median_ms"] >= row["minimum_ms"] > 0 for row in found)
    table = (tmp_path / f"{name}.md").read_text()
    assert table.count("\n| ") == len(found) + 1  # and the header
