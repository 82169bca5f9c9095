"""Directories that appear whole or not at all: written beside the target, synced, then renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from doran_core.errors import CheckpointError

__all__ = ["new_directory", "sync_path", "sync_tree"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def new_directory(target: Path, *, overwrite: bool, owned: Collection[str]) -> Iterator[Path]:
    """Give a temporary directory beside `target`; on a clean exit it becomes `target` in one step.

    An error inside leaves `target` as it was and removes the temporary directory. When an existing target is
    replaced, its files that are not in `owned` are carried over.

    Args:
        target: directory to make. Missing parents are made.
        overwrite: replace the files named in `owned` of an existing target.
        owned: file names that the writer is responsible for.

    Raises:
        CheckpointError: the target exists and may not be replaced, or is not a directory, or the disk is full.
    """
    target = target.resolve()
    _check_target(target, overwrite, owned)
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        if target.exists():
            _carry_over(target, staging, owned)
        yield staging
        _give_default_mode(staging)
        sync_tree(staging)
        _swap_in(staging, target)
        sync_path(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _check_target(target: Path, overwrite: bool, owned: Collection[str]) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise CheckpointError(f"cannot write {target}: it exists and is not a directory")
    if not overwrite and any((target / name).exists() for name in owned):
        raise CheckpointError(f"{target} already holds an adapter; pass overwrite=True to replace it")


def _carry_over(target: Path, staging: Path, owned: Collection[str]) -> None:
    for entry in target.iterdir():
        if entry.name in owned:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, staging / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(entry), str(staging / entry.name))


def _link_or_copy(source: str, target: str) -> object:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another filesystem, or one without hard links
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def _give_default_mode(path: Path) -> None:
    """mkdtemp makes directories private; an output directory has the mode that mkdir would give."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o777 & ~mask)


def _swap_in(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; an existing target ends up at `staging`, for the caller to remove."""
    try:
        staging.rename(target)
        return
    except OSError:
        if not target.is_dir():
            raise
    with suppress(OSError, AttributeError):
        _exchange(staging, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(aside)  # without an exchanging rename there is an instant with no target, never a half one
    try:
        staging.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """Linux's atomic exchange of two directories."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def sync_tree(directory: Path) -> None:
    """Force a directory and everything below it to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                sync_path(path)
        sync_path(Path(folder))


def sync_path(path: Path) -> None:
    """Force one file or directory entry to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
