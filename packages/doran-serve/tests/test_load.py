"""The short form of `load.py`: a minute under load, a restart in it, every answer checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from load import Load

pytestmark = pytest.mark.skipif(
    "DORAN_TEST_LOAD" not in os.environ, reason="takes minutes: set DORAN_TEST_LOAD; nox -s load is the long form"
)


def test_a_minute_under_load(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    load = Load(checkpoint("llama"), reference("llama"), tmp_path, adapters=40, clients=32, seed=2)
    report = load.run(60)
    print(report.line())
    assert not report.wrong, report.wrong[:5]
    assert not report.unanswered, report.unanswered[:5]
    assert report.deaths == 0
    assert report.right > 30
    assert report.stop_seconds < 45
    assert report.orphans == 0
