"""Two processes over gloo for all tests of this folder. Without DeepSpeed its part is skipped, and says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "tests" / "distributed"))  # processes.py, strategies.py, models.py

from processes import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _needs_deepspeed(request: pytest.FixtureRequest) -> None:
    if "zero" in request.node.name and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: ZeRO-2 and ZeRO-3 are NOT tested in this run")
