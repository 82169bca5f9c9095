"""The short form of `load.py`: half a minute under load, a restart in it, every answer checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from load import SHORT, Load


@pytest.mark.long
def test_half_a_minute_under_load(
    checkpoint: Callable[[str], Path],
    reference: Callable[[str], Any],
    engine: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.close()  # another file's, which would only hold memory
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    adapters, clients = int(SHORT["adapters"]), int(SHORT["clients"])
    load = Load(checkpoint("llama"), reference("llama"), tmp_path, adapters=adapters, clients=clients, seed=2)
    report = load.run(SHORT["seconds"])
    print(report.line())
    assert not report.wrong, report.wrong[:5]
    assert not report.unanswered, report.unanswered[:5]
    assert report.deaths == 0
    assert report.right > 30
    assert report.stop_seconds < 45
    assert report.orphans == 0
