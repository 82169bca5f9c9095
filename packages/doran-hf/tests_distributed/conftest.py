"""Two processes over gloo for all tests of this folder. Without DeepSpeed its part is skipped, and says so.

With DORAN_TEST_DEVICE=cuda the processes have a GPU each, and NCCL joins them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "tests" / "distributed"))  # devices.py, processes.py, ...

from devices import ON_GPUS
from processes import WORLD, Pair

if ON_GPUS and torch.cuda.device_count() < WORLD:
    raise pytest.UsageError(f"DORAN_TEST_DEVICE=cuda needs {WORLD} GPUs, found {torch.cuda.device_count()}")


@pytest.fixture(scope="session")
def pairs() -> Iterator[dict[str, Pair]]:
    """ZeRO-3 has its own: it leaves its own F.linear in a process, which autocast does not see and routers refuse."""
    with_deepspeed = ("doran_hf", "deepspeed")
    made = {"": Pair(), "zero2": Pair(preload=with_deepspeed), "zero": Pair(preload=with_deepspeed)}
    yield made
    for each in made.values():
        each.stop()


@pytest.fixture
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return next(pairs[kind] for kind in ("zero2", "zero", "") if kind in request.node.name)


@pytest.fixture(autouse=True)
def _needs_deepspeed(request: pytest.FixtureRequest) -> None:
    if "zero" in request.node.name and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: ZeRO-2 and ZeRO-3 are NOT tested in this run")
