"""A merge that is killed at any moment leaves no output, goes on when called again, and gives the same bytes."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import killable
import made
import pytest
import torch

from doran_core.merge import merge_checkpoint
from doran_core.merge import run as merge_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six shards of adapted and plain weights, and an undisturbed merge."""
    folder = tmp_path_factory.mktemp("kill")
    generator = torch.Generator().manual_seed(2)
    weights = {f"model.layers.{i}.q_proj.weight": torch.randn(256, 320, generator=generator) for i in range(24)}
    weights |= {f"model.layers.{i}.up.weight": torch.randn(200, 320, generator=generator) for i in range(24)}
    made.write_base(folder / "base", weights, shards=6)
    made.write_adapter(folder / "adapter", weights, targets=[f"model.layers.{i}.q_proj" for i in range(24)])
    merge_checkpoint(folder / "base", folder / "adapter", folder / "undisturbed")
    return folder


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported, so that ten of them take no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["doran_core.merge"])
    return context


def start(processes, folder):
    started = processes.Event()
    process = processes.Process(
        target=killable.slow_merge, args=(folder / "base", folder / "adapter", folder / "out", started)
    )
    process.start()
    assert started.wait(60)
    return process


def test_killed_at_ten_random_moments(folder, processes):
    expected = made.folder_bytes(folder / "undisturbed")
    process = start(processes, folder)
    begin = time.monotonic()
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - begin
    moments, killed, attempts = random.Random(20), 0, 0
    while killed < 10:
        attempts += 1
        assert attempts < 40
        if (folder / "out").exists():  # the one before was done before its signal came
            assert made.folder_bytes(folder / "out") == expected
            shutil.rmtree(folder / "out")
        process = start(processes, folder)
        time.sleep(moments.uniform(0.0, 0.5 * duration))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    if not (folder / "out").exists():
        process = start(processes, folder)
        process.join()
        assert process.exitcode == 0
    assert made.folder_bytes(folder / "out") == expected
    assert not (folder / ".out.doran-merge").exists()


class StopError(BaseException):
    """Stands for a kill: nothing in the merge may catch it and clean up."""


def interrupted(base, adapter, out, after, **options):
    """A merge that stops when `after` shards are finished."""
    original, finished = merge_run.ShardWriter, []

    class Writer(original):
        def finish(self):
            if len(finished) == after:
                raise StopError
            super().finish()
            finished.append(self.name)

    merge_run.ShardWriter = Writer
    try:
        with pytest.raises(StopError):
            merge_checkpoint(base, adapter, out, **options)
    finally:
        merge_run.ShardWriter = original


def shards_written(monkeypatch, merge):
    """Names of the shards that a merge writes."""
    original, names = merge_run.ShardWriter, []

    def writer(plan, *rest):
        names.append(plan.name)
        return original(plan, *rest)

    monkeypatch.setattr(merge_run, "ShardWriter", writer)
    merge()
    return names


@pytest.fixture
def half(tmp_path):
    """A merge of three shards that stopped in the second."""
    made.write_base(tmp_path / "base", shards=3)
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole")
    interrupted(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", after=1)
    assert not (tmp_path / "out").exists()
    return tmp_path


def test_finished_shards_are_not_written_again(half, monkeypatch):
    names = shards_written(monkeypatch, lambda: merge_checkpoint(half / "base", half / "adapter", half / "out"))
    assert names == ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    assert made.folder_bytes(half / "out") == made.folder_bytes(half / "whole")


def test_progress_starts_where_it_stopped(half):
    calls = []
    merge_checkpoint(half / "base", half / "adapter", half / "out", progress=lambda *call: calls.append(call))
    assert calls[0][0] > 0
    assert calls[-1][0] == calls[-1][1]


def _other_adapter(half):
    made.write_adapter(half / "second", made.base_weights(), seed=6)
    return {"adapters": half / "second"}


def _other_weight(half):
    return {"adapters": (half / "adapter", 0.5)}


def _other_dtype(half):
    return {"dtype": torch.bfloat16}


def _touched_base(half):
    os.utime(half / "base" / "model-00001-of-00003.safetensors", ns=(1, 1))
    return {}


@pytest.mark.parametrize("change", [_other_adapter, _other_weight, _other_dtype, _touched_base])
def test_leftovers_of_another_merge_are_discarded(half, monkeypatch, change):
    options = {"base_dir": half / "base", "adapters": half / "adapter"} | change(half)
    names = shards_written(monkeypatch, lambda: merge_checkpoint(out_dir=half / "out", **options))
    assert len(names) == 3
    merge_checkpoint(out_dir=half / "fresh", **options)
    assert made.folder_bytes(half / "out") == made.folder_bytes(half / "fresh")


def test_a_broken_manifest_is_discarded(half):
    (half / ".out.doran-merge" / "manifest.json").write_text("{")
    merge_checkpoint(half / "base", half / "adapter", half / "out")
    assert made.folder_bytes(half / "out") == made.folder_bytes(half / "whole")


def test_killed_right_after_the_last_rename(half, monkeypatch):
    with monkeypatch.context() as patch:
        original = merge_run.Staging.publish

        def publish(staging):
            original(staging)
            raise StopError

        patch.setattr(merge_run.Staging, "publish", publish)
        with pytest.raises(StopError):
            merge_checkpoint(half / "base", half / "adapter", half / "out")
    assert json.loads((half / ".out.doran-merge" / "manifest.json").read_text())
    assert merge_checkpoint(half / "base", half / "adapter", half / "out") == half / "out"
    assert made.folder_bytes(half / "out") == made.folder_bytes(half / "whole")
    assert not (half / ".out.doran-merge").exists()
