"""A disk that fills up in the middle of an export: one clear error, and nothing left on it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_adapter, saved, tiny_llama

from doran_core.errors import CheckpointError
from doran_export import ExportError, export


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "doran-test", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_graph(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doran_export.graph.torch_export._INLINE_LIMIT", 1000)
    source = saved(tiny_llama(num_hidden_layers=1, vocab_size=5000), tmp_path / "model")
    with pytest.raises(ExportError, match=f"cannot write {small_disk}/out: the disk is full"):
        export(source, small_disk / "out", exporter="torch")
    assert not list(small_disk.iterdir())


def test_merge(small_disk: Path, tmp_path: Path) -> None:
    base = saved(tiny_llama(num_hidden_layers=1, vocab_size=5000), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", 1, rank=2, target_modules=["q_proj"])
    with pytest.raises((CheckpointError, ExportError), match=r"disk is full|no space left"):
        export(out=small_disk / "out", base=base, adapter=adapter, exporter="torch")
    assert not list(small_disk.iterdir())
