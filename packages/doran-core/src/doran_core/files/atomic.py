"""Files and directories that appear whole or not at all: written beside their place, synced, then renamed.

All packages write through this module. The next writer of a directory deletes the leftovers of a killed one.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from doran_core.errors import CheckpointError, DoranError
from doran_core.files.swap import carry_over, swap_in
from doran_core.files.temporary import temporary

__all__ = ["check_place", "new_directory", "publish", "sync_path", "sync_tree", "write_file", "writing"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def new_directory(
    target: Path,
    *,
    overwrite: bool = False,
    owned: Collection[str] | None = None,
    error: type[DoranError] = CheckpointError,
) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; on a clean exit, rename it to `target` in one step.

    An error leaves `target` as it was and removes the temporary directory. Replacing an existing target keeps other
    programs' files, also those that they write meanwhile.

    Args:
        target: directory to make. Missing parents are made.
        overwrite: replace the files named in `owned` of an existing target.
        owned: file names that the writer is responsible for; None for a target that must not exist, or be empty.
        error: class of the errors below; CheckpointError by default.

    Raises:
        CheckpointError: the target exists and may not be replaced, is no directory or the current one, or cannot be
            written; the disk is full.
    """
    with writing(target, error):
        target = check_place(target, error)
        _check_target(target, overwrite, owned, error)
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary(target, directory=True) as staging:
            yield staging
            sync_tree(staging)  # sync before other programs' files are added, of which there may be many
            carried = carry_over(target, staging, owned or ()) if owned is not None else {}
            if target.is_dir():
                shutil.copymode(target, staging)
            sync_path(staging)
            if owned is None:
                staging.rename(target)  # fails if another writer has put something there
            else:
                swap_in(staging, target, owned, carried, overwrite)
            sync_path(target.parent)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file atomically, and sync it.

    Raises:
        CheckpointError: the file cannot be written; an existing file stays as it was.
    """
    with writing(path, CheckpointError):
        with temporary(path, directory=False) as part:
            part.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
            sync_path(part)
            part.replace(path)
        sync_path(path.parent)


def publish(staging: Path, target: Path) -> None:
    """Rename the complete directory `staging` to `target`, which must be absent or empty. Both have the same parent.

    Raises:
        OSError: `target` holds something, or cannot be written.
    """
    sync_path(staging)
    staging.rename(target)
    sync_path(target.parent)


@contextmanager
def writing(target: Path, error: type[DoranError]) -> Iterator[None]:
    """Inside this context, every error of the disk becomes one error that names `target`.

    Raises:
        DoranError: of the class `error`. Its cause tells a full disk from a forbidden one.
    """
    try:
        yield
    except DoranError as known:
        if not _disk_is_full(known):
            raise
        raise error(f"cannot write {target}: the disk is full") from known
    except OSError as failed:
        names = [name for name in (failed.filename, failed.filename2) if name is not None]
        if names and not _disk_is_full(failed) and not any(_is_beside(name, target) for name in names):
            raise  # an error on another file, which was read meanwhile
        reason = "the disk is full" if _disk_is_full(failed) else failed.strerror or str(failed)
        if failed.errno == errno.ENOTEMPTY or failed.filename == str(target.resolve()):
            reason = f"something else was put there meanwhile ({reason})"
        raise error(f"cannot write {target}: {reason}") from failed
    except Exception as failed:  # on a full disk, libraries raise errors of their own
        if not _disk_is_full(failed):
            raise
        raise error(f"cannot write {target}: the disk is full") from failed


def _is_beside(path: str | bytes | int, target: Path) -> bool:
    if isinstance(path, int):
        return False
    return Path(os.fsdecode(path)).resolve().is_relative_to(target.resolve().parent)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an exception or one of its causes reports a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def check_place(target: Path, error: type[DoranError] = CheckpointError) -> Path:
    """The resolved path of a directory to be written.

    Raises:
        CheckpointError: it is the root, the current directory or one above it. Putting another directory in its place
            would leave the shell that called in one that is gone.
    """
    given, target = target, target.resolve()
    try:
        here = Path.cwd()
    except OSError:  # the current directory was deleted
        here = None
    if not target.name or (here is not None and (target == here or target in here.parents) and target.is_dir()):
        raise error(f"cannot write {str(given) or '.'!r}: it is the current directory or holds it; name a new one")
    return target


def _check_target(target: Path, overwrite: bool, owned: Collection[str] | None, error: type[DoranError]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise error(f"cannot write {target}: it exists and is not a directory")
    if owned is None:
        inside = next(target.iterdir(), None)
        if inside is not None:
            raise error(f"cannot write {target}: it is not empty (it holds {inside.name}); name a new directory")
    elif not overwrite and any((target / name).exists() for name in owned):
        raise error(f"{target} already holds an adapter; pass overwrite=True to replace it")


def sync_tree(directory: Path) -> None:
    """Force a directory and everything below it to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                sync_path(path)
        sync_path(Path(folder))


def sync_path(path: Path) -> None:
    """Force one file or directory entry to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
