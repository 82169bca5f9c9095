"""The short form of the harness, with a seed of its own for each run: the long one is `nox -s faults`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the harness reads with every package")
pytest.importorskip("onnxruntime", reason="the harness reads with every package")

sys.path.insert(0, str(Path(__file__).parent))

from inputs import throw
from kills import kill_writers
from legal import write_all
from memory import memory
from pressure import full_disks, readers_and_writers, two_writers
from readers import warm_up
from real import write_model

pytestmark = pytest.mark.xdist_group("faults")  # the tests share what `legal` writes


@pytest.fixture(scope="module")
def legal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("legal")
    write_all(folder)
    write_model(folder)
    warm_up(folder, tmp_path_factory.mktemp("warm"))
    return folder


def test_mutated_inputs(legal: Path, tmp_path: Path) -> None:
    seed = int(time.time())
    print(f"seed {seed}")
    found = throw(legal, 300, seed, 25.0, tmp_path / "failures", workers=2)
    kept = [str(path) for path in (tmp_path / "failures").glob("*")]
    assert {name: found[name] for name in ("crashes", "hangs", "other_errors", "silent")} == dict.fromkeys(
        ("crashes", "hangs", "other_errors", "silent"), 0
    ), (seed, kept)
    assert found["accepted"] > 0
    assert found["refused"] > found["accepted"]


def test_killed_writers(legal: Path) -> None:
    found = kill_writers(legal, 20)
    assert (found["kills"], found["wrong"], found["left_over"]) == (20, 0, 0)


def test_readers_and_writers(legal: Path) -> None:
    found = readers_and_writers(legal, 2.0)
    assert {name: found[name] for name in ("mixed", "raised", "lost", "left_over")} == dict.fromkeys(
        ("mixed", "raised", "lost", "left_over"), 0
    )
    assert found["reads"] > 0
    assert found["overwrites"] > 0


def test_two_writers(legal: Path) -> None:
    found = two_writers(legal, 1.0)
    assert (found["raised"], found["mixed"], found["left_over"]) == (0, 0, 0)


def test_full_disks(legal: Path) -> None:
    found = full_disks(legal)
    assert (found["raised"], found["left_over"]) == (0, 0)


def test_memory(legal: Path) -> None:
    found = memory(legal)
    assert found["over"] == 0, found
