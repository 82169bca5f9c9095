"""The hidden directory beside the output in which a merge is written, and from which a killed merge resumes.

    .OUT.doran-merge/manifest.json   what is being merged; another merge's leftovers are discarded
    .OUT.doran-merge/lock            held while a merge runs
    .OUT.doran-merge/model/          finished files by their final name, the current one with ".part" added

`model` becomes OUT by one rename when all is there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from doran_core.errors import CheckpointError, CorruptFileError
from doran_core.files.atomic import check_place, publish, sync_path, write_file
from doran_core.files.jsonfile import json_text, read_json

__all__ = ["Staging", "open_staging", "staging_path"]


def staging_path(out_dir: Path) -> Path:
    """The staging directory of a merge into `out_dir`."""
    return out_dir.with_name(f".{out_dir.name}.doran-merge")


class Staging:
    """The directory of one merge, locked."""

    def __init__(self, root: Path, out_dir: Path, identity: Mapping[str, Any]) -> None:
        self.root = root
        self.out_dir = out_dir
        self.model = root / "model"
        manifest = root / "manifest.json"
        self.finished = False
        if _saved_identity(manifest) == identity:
            # A merge that was killed after its last rename leaves the manifest, but no model.
            self.finished = not self.model.exists() and out_dir.is_dir() and any(out_dir.iterdir())
        else:
            shutil.rmtree(self.model, ignore_errors=True)
            manifest.unlink(missing_ok=True)
        if self.finished:
            return
        self.model.mkdir(exist_ok=True)
        if not manifest.exists():
            write_file(manifest, json_text(identity))

    def is_done(self, name: str, size: int) -> bool:
        """Whether a file was finished by an earlier run."""
        path = self.model / name
        return path.exists() and path.stat().st_size == size

    def part(self, name: str) -> Path:
        """The path for writing a file until it is complete."""
        part = self.model / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        return part

    def complete(self, name: str) -> None:
        """Sync a complete file and give it its final name."""
        sync_path(self.part(name))
        (self.model / f"{name}.part").rename(self.model / name)

    def publish(self) -> None:
        """Make the output directory appear."""
        for part in self.model.rglob("*.part"):
            part.unlink()
        publish(self.model, self.out_dir)


def _saved_identity(manifest: Path) -> dict[str, Any] | None:
    with suppress(OSError, CorruptFileError):
        return read_json(manifest)
    return None


@contextmanager
def open_staging(out_dir: Path, identity: Mapping[str, Any]) -> Iterator[Staging]:
    """Lock and open the staging directory; an error removes it, a kill or an interrupt leaves it to be resumed.

    Raises:
        CheckpointError: another merge writes to the same output, or the output is there already.
        OSError: a disk operation fails.
    """
    check_place(out_dir)
    root = staging_path(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    root.mkdir(exist_ok=True)
    lock = _open_lock(root)
    try:
        _lock(lock, out_dir)
        try:
            staging = Staging(root, out_dir, identity)
            if not staging.finished and out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
                raise CheckpointError(f"{out_dir} exists and is not empty; choose another output directory")
            yield staging
        except Exception:
            shutil.rmtree(root, ignore_errors=True)
            raise
        shutil.rmtree(root, ignore_errors=True)
    finally:
        os.close(lock)


def _open_lock(root: Path) -> int:
    try:
        return os.open(root / "lock", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError:
        with suppress(OSError):  # another merge works in it
            root.rmdir()
        raise


def _lock(fd: int, out_dir: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock, all else works
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CheckpointError(f"another merge is writing {out_dir} at this moment") from error
