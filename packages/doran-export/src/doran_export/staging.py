"""An output directory that appears whole or not at all: written beside its place, renamed at the end."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from doran_export.errors import ExportError

__all__ = ["require_free_place", "staged_directory"]


def require_free_place(out: Path) -> None:
    """Check that `out` may be created: it is absent or an empty directory.

    Raises:
        ExportError: it is a file, or a directory that holds something.
    """
    if out.is_dir():
        inside = next(out.iterdir(), None)
        if inside is not None:
            raise ExportError(f"output directory {out} is not empty (it holds {inside.name}): name a new one")
    elif out.exists():
        raise ExportError(f"output {out} exists and is not a directory: name a new directory")


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield a new directory beside `out` and move it to `out` when the block succeeds.

    When the block raises, the new directory is removed and `out` stays as it was. The two are on one file system, so
    the move is one rename.

    Raises:
        ExportError: `out` is not free, its parent cannot be written, or the disk is full.
    """
    require_free_place(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise ExportError(f"cannot write beside {out}: {error.strerror or error}") from error
    try:
        yield work
        require_free_place(out)
        work.chmod(0o755)
        work.replace(out)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if _is_disk_full(error):
            raise ExportError(f"no space left on the disk of {out.parent}; nothing was written to {out}") from error
        raise


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is what an exception, or one that it was raised from, reports."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
