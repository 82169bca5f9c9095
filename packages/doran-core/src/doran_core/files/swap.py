"""Puts a new directory in the place of an old one in one step; files of other programs in the old one are kept."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from doran_core.files.temporary import SUFFIX, locked

__all__ = ["carry_over", "swap_in"]

_PATIENCE = 5.0
"""Seconds in which other programs may keep writing into a directory that is being swapped out."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

Carried = dict[Path, int]
"""Entries that were carried into a new directory: inode by relative path."""


def carry_over(source: Path, target: Path, owned: Collection[str]) -> Carried:
    """Link or copy all entries except the owned ones into a directory that is not published yet."""
    carried: Carried = {}
    for path in _others(source, owned):
        relative = path.relative_to(source)
        place = target / relative
        with suppress(FileNotFoundError, FileExistsError):  # removed meanwhile; written by this writer, too
            if path.is_dir() and not path.is_symlink():
                place.mkdir()
                shutil.copymode(path, place)
                continue
            _link_or_copy(path, place)
            carried[relative] = place.lstat().st_ino
    return carried


def _others(source: Path, owned: Collection[str]) -> list[Path]:
    """Entries of a directory that the writer does not own, each folder before its contents."""
    found: list[Path] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in source.iterdir():
            if path.name in owned:
                continue
            found.append(path)
            if path.is_dir() and not path.is_symlink():
                found += _others(path, ())
    return found


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # another filesystem, or one without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def swap_in(
    staging: Path,
    target: Path,
    owned: Collection[str],
    carried: Carried,
    overwrite: bool,
) -> None:
    """Put `staging` in the place of `target`, and keep what other programs have written there until that very moment.

    Raises:
        FileExistsError: `target` has got one of the owned files, and `overwrite` is not set. OSError otherwise.
    """
    if not _has_entries(target):
        try:
            staging.rename(target)
            return
        except OSError:
            if not target.is_dir():
                raise
    with locked(target):  # of the old directory
        try:
            _exchange(staging, target)
            old = staging
        except (OSError, AttributeError):  # no atomic exchange: for an instant there is no target
            old = staging.with_name(f"{staging.name.removesuffix(SUFFIX)}.old{SUFFIX}")
            target.rename(old)
            try:
                staging.rename(target)
            except OSError:
                old.rename(target)
                raise
        if not overwrite and any((old / name).exists() for name in owned):
            _put_back(old, target)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        _empty(old, target, owned, carried)


def _has_entries(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def _put_back(old: Path, target: Path) -> None:
    """Another writer came first, and its files may not be overwritten."""
    with suppress(OSError, AttributeError):
        _exchange(old, target)
        return
    shutil.rmtree(target)
    old.rename(target)


def _empty(old: Path, target: Path, owned: Collection[str], carried: Carried) -> None:
    """Move the last files of other programs out of the old directory, until it is empty and can be removed."""
    for name in owned:
        path = old / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        for path in _others(old, ()):
            with suppress(FileNotFoundError):
                _move_out(path, target / path.relative_to(old), carried.get(path.relative_to(old)))
        for folder in reversed([path for path in _others(old, ()) if path.is_dir() and not path.is_symlink()]):
            with suppress(OSError):  # something came into it
                folder.rmdir()
        with suppress(OSError):  # likewise
            old.rmdir()
            return


def _move_out(path: Path, place: Path, carried: int | None) -> None:
    """Move one entry; what is at its place already stays, unless it is an older state that was carried there."""
    if path.is_dir() and not path.is_symlink():
        place.mkdir(exist_ok=True)
        return
    try:
        os.link(path, place, follow_symlinks=False)
    except FileExistsError:
        now = place.lstat().st_ino
        if carried is not None and now == carried and path.lstat().st_ino != carried:
            path.replace(place)
            return
    except OSError:  # no hard links here
        path.replace(place)
        return
    path.unlink()


def _exchange(first: Path, second: Path) -> None:
    """Linux's atomic exchange of two directories."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
