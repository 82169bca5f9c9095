"""Private copies of admitted adapters, by the digest of their files: engines load the checked files. No vLLM here.

While a request waits, its adapter's directory may be damaged, replaced or removed. So the server copies an adapter
when it admits it, and sends the engine the directory with the digest of its files. The engine compares the digest and
reads the copy. On a machine without the copy, it reads a directory of the same digest.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

from doran_core.adapter.digest import directory_digest, files_digest
from doran_core.errors import AdapterFormatError
from doran_core.files.opening import OpenDirectory

__all__ = ["AdmittedCopies", "content_digest", "marked", "unmarked"]

_MARK = "#sha256="
_LIMIT_VARIABLE = "DORAN_ADMITTED_GIB"
_LIMIT = 20.0
"""Most GiB of copies; beyond it, the least recently admitted copies are removed."""
_KEPT_SECONDS = 600
"""Seconds for which an admitted copy is never removed: requests for it may still wait."""

_logger = logging.getLogger("vllm.doran_serve")


def marked(path: str | Path, digest: str) -> str:
    """A path that contains an adapter directory and the digest of its admitted files."""
    return f"{path}{_MARK}{digest}"


def unmarked(path: str) -> tuple[str, str | None]:
    """Directory and digest of a path from `marked`; None for a plain path."""
    directory, mark, digest = path.rpartition(_MARK)
    return (directory, digest) if mark else (path, None)


def content_digest(folder: Path) -> str:
    """SHA-256 of the adapter's files, in hexadecimal digits.

    Raises:
        AdapterFormatError: a file cannot be read, or has another format than its name says.
    """
    return _digits(directory_digest(folder))


def _digits(digest: str) -> str:
    """A digest without the algorithm's name, as in paths."""
    return digest.removeprefix("sha256:")


class AdmittedCopies:
    """The copies in one directory, each in a subdirectory named by its digest. Several processes may share it.

    Args:
        directory: the directory of the copies; created with the first copy.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def keep(self, source: Path) -> str:
        """Copy the adapter files of `source`, unless there is a copy, and return their digest.

        Without room for a copy, the engine reads `source` itself, and one warning is logged.

        Raises:
            AdapterFormatError: a file is missing, unreadable, or no regular file.
        """
        try:
            return self._copy(source)
        except OSError as error:
            _logger.warning("no private copy of %s (%s): the engine reads the directory itself", source, error)
        return content_digest(source)

    def touch(self, digest: str) -> bool:
        """Record that the copy was admitted now; False if there is no copy."""
        try:
            os.utime(self.directory / digest)
        except OSError:
            return False
        return True

    def find(self, source: Path, digest: str) -> Path:
        """The directory of the version `digest`: its copy, which is made again if it is gone and `source` still has
        this version.

        Raises:
            AdapterFormatError: there is no sound copy, and `source` holds something else.
        """
        copy = self.directory / digest
        if self._sound(digest):
            return copy
        shutil.rmtree(copy, ignore_errors=True)
        if self.keep(source) == digest:
            return copy if copy.exists() else source
        raise AdapterFormatError(
            f"{source}: the admitted version (sha256 {digest[:16]}...) is gone: the directory holds another one, and "
            f"there is no sound copy in {self.directory}; send the request again, or set DORAN_CACHE_DIR to a "
            "directory that all nodes of the server share"
        )

    def _copy(self, source: Path) -> str:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._make_room()
        staging = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=self.directory))
        try:
            files: dict[str, int] = {}

            def write(name: str, data: bytes) -> None:
                if name not in files:
                    files[name] = os.open(staging / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o400)
                view = memoryview(data)
                while view:
                    view = view[os.write(files[name], view) :]

            try:
                with OpenDirectory(source) as opened:
                    digest = _digits(files_digest(opened, write))
            finally:
                for descriptor in files.values():
                    os.close(descriptor)
            target = self.directory / digest
            if not (self.touch(digest) and self._sound(digest)):
                shutil.rmtree(target, ignore_errors=True)
                try:
                    staging.rename(target)
                except OSError:
                    if not self._sound(digest):  # another process has made the same copy
                        raise
            return digest
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _sound(self, digest: str) -> bool:
        try:
            return content_digest(self.directory / digest) == digest
        except AdapterFormatError:
            return False

    def _make_room(self) -> None:
        """Remove the least recently admitted copies until the total is below the limit."""
        limit = float(os.environ.get(_LIMIT_VARIABLE) or _LIMIT) * 2**30
        folders = []
        for entry in os.scandir(self.directory):
            try:
                size = sum(file.stat().st_size for file in os.scandir(entry.path))
                folders.append((entry.stat().st_mtime, size, entry.path))
            except OSError:  # removed by another process, or no directory
                continue
        total = sum(size for _, size, _ in folders)
        oldest = time.time() - _KEPT_SECONDS
        for admitted, size, path in sorted(folders):
            if admitted >= oldest or (total <= limit and not path.endswith(".tmp")):
                continue
            shutil.rmtree(path, ignore_errors=True)
            total -= size
