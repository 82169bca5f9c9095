"""`doran publish`: an adapter is put in place in one step."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_specs import make_adapter
from click.testing import CliRunner
from safetensors.torch import save_file

from doran_core.adapter import read_folded
from doran_core.errors import DoranError
from doran_serve import publish_adapter
from doran_serve.cli import publish


@pytest.fixture
def base() -> dict[str, Any]:
    return {"model.layers.0.mlp.up_proj": torch.randn(24, 16)}


def write(base: dict[str, Any], folder: Path, rank: int) -> Path:
    return make_adapter("folded", base, ("up_proj",), rank=rank, seed=rank, size=0.4).write(folder)


def test_replaces_and_never_nests(base: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "served" / "a"
    for rank in (3, 4):
        publish_adapter(write(base, tmp_path / f"made-{rank}", rank), target)
        (target / "notes.txt").write_text("kept")
        assert read_folded(target).modules["model.layers.0.mlp.up_proj"].A.shape[0] == rank
    assert {path.name for path in target.iterdir()} >= {"adapter_config.json", "notes.txt"}
    assert not any(path.is_dir() for path in target.iterdir())
    assert [path.name for path in target.parent.iterdir()] == ["a"]


def test_what_it_refuses(base: dict[str, Any], tmp_path: Path) -> None:
    adapter = write(base, tmp_path / "made", 3)
    write(base, tmp_path / "served" / "a", 4)
    with pytest.raises(DoranError, match=r"holds other things than an adapter; name .*served/made"):
        publish_adapter(adapter, tmp_path / "served")
    with pytest.raises(DoranError, match="may not start with a dot"):
        publish_adapter(adapter, tmp_path / "served" / ".a")
    with pytest.raises(DoranError, match="is the adapter itself"):
        publish_adapter(adapter, adapter)
    (adapter / "doran_scale.safetensors").write_bytes(b"cut")
    with pytest.raises(DoranError, match=r"made/doran_scale\.safetensors"):
        publish_adapter(adapter, tmp_path / "served" / "a")
    assert read_folded(tmp_path / "served" / "a").modules


def test_against_a_base(base: dict[str, Any], tmp_path: Path) -> None:
    adapter = write(base, tmp_path / "made", 3)
    (tmp_path / "base").mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.randn(24, 8)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(DoranError, match="up_proj"):
        publish_adapter(adapter, tmp_path / "served" / "a", str(tmp_path / "base"))
    assert not (tmp_path / "served" / "a").exists()


def test_readers_see_one_version_or_the_other(base: dict[str, Any], tmp_path: Path) -> None:
    made = [write(base, tmp_path / f"made-{rank}", rank) for rank in (3, 4)]
    target = publish_adapter(made[0], tmp_path / "served" / "a")
    stop = threading.Event()

    def change() -> None:
        for turn in range(60):
            publish_adapter(made[turn % 2], target)
        stop.set()

    changing = threading.Thread(target=change)
    changing.start()
    reads = 0
    while not stop.is_set():
        assert read_folded(target).modules["model.layers.0.mlp.up_proj"].A.shape[0] in (3, 4)
        reads += 1
    changing.join()
    assert reads > 5


def test_the_command(base: dict[str, Any], tmp_path: Path) -> None:
    adapter = write(base, tmp_path / "made", 3)
    done = CliRunner().invoke(publish, [str(adapter), str(tmp_path / "served" / "a")])
    assert done.exit_code == 0, done.output
    assert read_folded(tmp_path / "served" / "a").modules
