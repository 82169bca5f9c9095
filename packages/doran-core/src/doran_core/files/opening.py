"""Opens every file that doran reads: regular files only, sizes limited, one save at a time, errors that name the file.

Every file that another program may have written is read through this module.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from doran_core.errors import CorruptFileError, DoranError

__all__ = ["OpenDirectory", "is_plain_name", "named_errors", "open_regular", "read_directory", "read_file"]

_T = TypeVar("_T")

_TRIES = 100
"""How often to read a directory again that is replaced while it is read."""

_LONGEST_NAME = 255
"""Longest file name on common file systems, in bytes."""

_FROM_CONTENTS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, AssertionError)
"""Errors that Python and torch raise on malformed contents that pass all checks. RecursionError is a RuntimeError."""


def is_plain_name(name: str) -> bool:
    """Whether an untrusted name may become the name of a directory entry.

    Such a name has no leading dot (temporary and hidden entries do), no path separator, and a length that every file
    system accepts.
    """
    if not name or name.startswith(".") or any(character in name for character in "/\\\0"):
        return False
    try:
        return len(name.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:  # a lone surrogate
        return False


@contextmanager
def named_errors(where: object, error: type[DoranError] = CorruptFileError) -> Iterator[None]:
    """Inside this context, every error about a file's contents names the file.

    Args:
        where: the file or directory.
        error: class of the error if no check caught the fault.

    Raises:
        DoranError: one raised inside, with `where` in front if its message does not name it; or `error`.
    """
    try:
        yield
    except DoranError as known:
        if str(where) in str(known):
            raise
        raise type(known)(f"{where}: {known}") from known
    except OSError as failed:
        raise error(f"{where}: cannot be read: {failed.strerror or failed}") from failed
    except _FROM_CONTENTS as failed:
        first = next(iter(str(failed).splitlines()), "")[:200]
        raise error(f"{where}: cannot be understood ({type(failed).__name__}: {first})") from failed


@contextmanager
def open_regular(path: Path | str, where: Path | None = None, *, dir_fd: int | None = None) -> Iterator[int]:
    """A file descriptor for reading.

    Args:
        path: the file; a symbolic link to a regular file is one.
        where: the file's name in messages, `path` by default.
        dir_fd: of an open directory that `path` is relative to.

    Raises:
        CorruptFileError: a directory, a pipe, a device or a socket, none of which is ever read. OSError otherwise.
    """
    # Without O_NONBLOCK the opening of a pipe that nobody writes to never returns.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise CorruptFileError(f"{where or path}: is a socket, expected a file") from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or device"
            raise CorruptFileError(f"{where or path}: is {kind}, expected a file")
        yield fd
    finally:
        os.close(fd)


def read_file(path: Path | str, limit: int, where: Path | None = None, *, dir_fd: int | None = None) -> bytes:
    """All bytes of a regular file.

    Args:
        path: as for :func:`open_regular`.
        where: likewise.
        dir_fd: likewise.
        limit: the most bytes that such a file may have.

    Raises:
        CorruptFileError: it is larger, or no regular file. OSError otherwise.
    """
    with open_regular(path, where, dir_fd=dir_fd) as fd, os.fdopen(fd, "rb", closefd=False) as file:
        size = _checked_size(where or Path(path), fd, limit)
        data = file.read(size + 1)
    if len(data) > size:
        raise _too_large(where or Path(path), size)
    return data


def _checked_size(path: Path, fd: int, limit: int) -> int:
    size = os.fstat(fd).st_size
    if size > limit:
        raise _too_large(path, limit)
    return size


def _too_large(path: Path, limit: int) -> CorruptFileError:
    return CorruptFileError(f"{path}: more than {limit} bytes, too large for what it should hold")


class OpenDirectory:
    """An open directory: all files read through it come from one save, even if another directory takes its path.

    Args:
        path: the directory.

    Raises:
        OSError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY) if _HAS_DIR_FD else None
        if self._fd is None and not path.is_dir():
            raise NotADirectoryError(f"{path} is no directory")

    def __enter__(self) -> OpenDirectory:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def holds(self, name: str) -> bool:
        """Whether the directory has an entry of this name, readable or not."""
        try:
            os.stat(self._place(name), dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of one of its files; arguments and errors as for :func:`read_file`."""
        return read_file(self._place(name), limit, self.path / name, dir_fd=self._fd)

    @contextmanager
    def open(self, name: str, limit: int) -> Iterator[int]:
        """A file descriptor of one of its files, for reading; arguments and errors as for :func:`read_file`."""
        path = self.path / name
        with open_regular(self._place(name), path, dir_fd=self._fd) as fd:
            _checked_size(path, fd, limit)
            yield fd

    def is_current(self) -> bool:
        """Whether the path still leads to this directory."""
        if self._fd is None:
            return True
        try:
            now, mine = self.path.stat(), os.fstat(self._fd)
        except OSError:
            return False
        return os.path.samestat(now, mine)

    def _place(self, name: str) -> str | Path:
        return name if self._fd is not None else self.path / name


_HAS_DIR_FD = os.open in os.supports_dir_fd and hasattr(os, "O_DIRECTORY")


def read_directory(path: Path, read: Callable[[OpenDirectory], _T]) -> _T:
    """Call `read` on a directory, and call it again if the directory is replaced meanwhile, so that all files come
    from one save.

    Args:
        path: the directory. A writer that replaces it puts another one in its place, as doran's do.
        read: called with the directory; again if it was replaced before `read` was done.

    Raises:
        DoranError, OSError: as `read` does on a directory that stays.
        CorruptFileError: it is replaced faster than it can be read.
    """
    for _ in range(_TRIES):
        with OpenDirectory(path) as directory:
            try:
                result = read(directory)
            except (DoranError, OSError):
                if directory.is_current():
                    raise
                continue
            if directory.is_current():
                return result
    raise CorruptFileError(f"{path}: was replaced {_TRIES} times while it was read")
