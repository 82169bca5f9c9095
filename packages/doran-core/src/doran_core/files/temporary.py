"""Hidden temporary files and folders of writers: locked while the writer lives, swept after a writer was killed.

A writer holds a lock on its files as long as it lives. So a file that can be locked was left by a killed writer.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["SUFFIX", "is_temporary", "locked", "temporary"]

SUFFIX = ".doran-tmp"
"""Suffix of names that are being written. With the leading dot, no reader takes them for adapters."""

_PATIENCE = 5.0
"""Seconds to wait for another writer's lock, which is held for milliseconds."""


def is_temporary(name: str) -> bool:
    """Whether an entry of a directory is being written, or was left by a writer that was killed."""
    return name.startswith(".") and name.endswith(SUFFIX)


@contextmanager
def temporary(target: Path, *, directory: bool) -> Iterator[Path]:
    """Create a hidden file or directory beside `target`, locked while it is written. Deletes leftovers without a
    writer."""
    path = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}{SUFFIX}")
    with locked(target.parent):
        _sweep(target.parent)
        if directory:
            path.mkdir()
        else:
            path.touch()
        lock = _lock(path)
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _sweep(parent: Path) -> None:
    for entry in os.scandir(parent):
        if not is_temporary(entry.name):
            continue
        path = Path(entry.path)
        with suppress(OSError):  # its writer lives, or another process is deleting it
            lock = _lock(path)
            if lock is None:
                return
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
            os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that locks a file or directory; None where there are no locks.

    Raises:
        BlockingIOError: somebody else has the lock.
    """
    if sys.platform == "win32":
        return None
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:  # a file system without locks
        os.close(fd)
        return None
    return fd


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a directory's lock; continue without it if another process keeps it, or there are no locks."""
    end, lock = time.monotonic() + _PATIENCE, None
    while time.monotonic() < end:
        try:
            lock = _lock(path)
            break
        except BlockingIOError:
            time.sleep(0.01)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
