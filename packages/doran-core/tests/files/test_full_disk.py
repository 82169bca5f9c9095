"""A disk that is full, or fills up, has one error and leaves nothing behind."""

import errno
import os

import made
import pytest

from doran_core.adapter import write_trainable
from doran_core.errors import CheckpointError
from doran_core.files.atomic import new_directory, write_file
from doran_core.merge import merge_checkpoint


def test_a_full_disk_has_one_error_whoever_meets_it(tmp_path):
    def fail(error):
        with new_directory(tmp_path / "out") as staging:
            (staging / "x").write_text("1")
            raise error

    for error in (OSError(errno.ENOSPC, "No space left"), OSError(errno.EDQUOT, "quota"), ValueError("a library")):
        if isinstance(error, ValueError):
            error.__cause__ = OSError(errno.ENOSPC, "No space left")
        with pytest.raises(CheckpointError, match=r"cannot write .*out: the disk is full"):
            fail(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [0, 4096])
def test_a_disk_with_nothing_left(small_disk, tmp_path, left):
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    made.write_adapter(tmp_path / "adapter", weights)
    record, _ = made.trainable_record(weights)
    with (small_disk / "full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):  # noqa: PT012
        while True:
            file.write(b"x" * 4096)
    os.truncate(small_disk / "full", (small_disk / "full").stat().st_size - left)
    for use in (
        lambda: merge_checkpoint(tmp_path / "base", tmp_path / "adapter", small_disk / "out"),
        lambda: write_trainable(record, small_disk / "saved"),
        lambda: write_file(small_disk / "file", b"x" * 32768),
    ):
        with pytest.raises(CheckpointError, match=r"cannot write .*the disk is full"):
            use()
        assert [path.name for path in small_disk.iterdir()] == ["full"]


def test_a_disk_that_fills_up_while_the_small_files_are_copied(tmp_path, monkeypatch):
    made.write_base(tmp_path / "base")
    made.write_adapter(tmp_path / "adapter", made.base_weights())

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr("doran_core.merge.side_files.shutil.copyfile", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert made.hidden(tmp_path) == []
