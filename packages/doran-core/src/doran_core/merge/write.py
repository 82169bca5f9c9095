"""Writes one shard by its plan: untouched bytes are copied by the operating system, adapted tensors are computed.

Each copied range and each tensor is one task of a thread pool. Memory is bounded by a few pieces of a tensor per
thread, for shards of any size.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from doran_core.checkpoint.binding import CHUNK_ELEMENTS, BoundModule
from doran_core.checkpoint.checkpoint import open_for_reading
from doran_core.checkpoint.weight_layout import is_transposed, to_matrix
from doran_core.errors import NonFiniteError
from doran_core.files.layout import DTYPES, TensorEntry
from doran_core.files.tensors import write_tensor
from doran_core.merge.plan import Content, Copied, Given, Merged, MergedExperts, ShardPlan

__all__ = ["ShardWriter", "merge_threads", "merged_values"]

_COPY_BYTES = 32 * 2**20
_MOST_THREADS = 8
_SYNC_INTERVAL = 0.2
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)

Advance = Callable[[int], None]


@contextmanager
def merge_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for a merge: one per core, without torch's own parallelism, because the pieces are small."""
    before = torch.get_num_threads()
    count = min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_THREADS
    )
    pool = ThreadPoolExecutor(count, "doran-merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # threads that start later use the number that was set last


class ShardWriter:
    """The writer of one shard. The constructor starts the work.

    Args:
        plan: the shard's header, and the source of each tensor.
        path: the file to write; an existing one is replaced.
        pool: the threads that read, compute and write.
        advance: called with the number of bytes written, from those threads.

    Raises:
        OSError: the output cannot be written.
    """

    def __init__(self, plan: ShardPlan, path: Path, pool: ThreadPoolExecutor, advance: Advance) -> None:
        self.name = plan.name
        self._tasks: list[Future[None]] = []
        self._fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)
        try:
            _allocate(self._fd, plan.nbytes)
            os.pwrite(self._fd, plan.header, 0)
            advance(len(plan.header))
            for entry, content in plan.tensors:
                if not _is_plain_copy(entry, content):
                    self._tasks.append(pool.submit(_write_content, self._fd, entry, content, advance))
            self._tasks += [pool.submit(_copy_range, self._fd, part, advance) for part in _copy_ranges(plan)]
        except BaseException:
            self.abandon()
            raise

    def finish(self) -> None:
        """Wait until all is written and on the disk.

        Raises:
            CheckpointError: a base file cannot be read. OSError: the output cannot be written.
        """
        try:
            pending = set(self._tasks)
            while pending:
                done, pending = wait(pending, timeout=_SYNC_INTERVAL, return_when=FIRST_EXCEPTION)
                for task in done:
                    task.result()
                if pending:
                    os.fsync(self._fd)  # sync repeatedly, so that disk and threads work in parallel
            os.fsync(self._fd)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Cancel tasks that have not begun, and wait for the others before the file is closed."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            if not task.cancelled():
                with suppress(Exception):
                    task.result()
        self._tasks = []
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _allocate(fd: int, size: int) -> None:
    """Reserve the file's blocks, so that a full disk is noticed at once."""
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        os.ftruncate(fd, size)  # the file system cannot reserve blocks


@dataclass
class _Range:
    source: Path
    start: int
    stop: int
    target: int


def _is_plain_copy(entry: TensorEntry, content: Content) -> bool:
    return isinstance(content, Copied) and content.file.entry.dtype == entry.dtype


def _copy_ranges(plan: ShardPlan) -> Iterator[_Range]:
    """The byte ranges to copy as they are; neighbours in both files are joined."""
    last: _Range | None = None
    for entry, content in plan.tensors:
        if not (isinstance(content, Copied) and _is_plain_copy(entry, content)):
            continue
        source = content.file.entry
        if last is not None:
            follows = (last.source, last.stop) == (content.file.path, source.start)
            if follows and last.target + last.stop - last.start == entry.start:
                last.stop = source.stop
                continue
            yield last
        last = _Range(content.file.path, source.start, source.stop, entry.start)
    if last is not None:
        yield last


def _copy_range(target_fd: int, part: _Range, advance: Advance) -> None:
    with open_for_reading(part.source) as fd:
        position, target = part.start, part.target
        in_kernel = hasattr(os, "copy_file_range")
        while position < part.stop:
            size = min(_COPY_BYTES, part.stop - position)
            if in_kernel:
                try:
                    count = os.copy_file_range(fd, target_fd, size, position, target)
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise
                    in_kernel = False
                    continue
            else:
                count = os.pwrite(target_fd, os.pread(fd, size, position), target)
            if count == 0:
                raise OSError(errno.EIO, f"{part.source} became shorter while it was read")
            position, target = position + count, target + count
            advance(count)


@torch.no_grad()
def _write_content(fd: int, entry: TensorEntry, content: Content, advance: Advance) -> None:
    dtype = DTYPES[entry.dtype]
    if isinstance(content, Given):
        write_tensor(fd, content.tensor.to(dtype), entry.start)
        advance(entry.nbytes)
    elif isinstance(content, Copied):
        _write_converted(fd, entry, content, dtype, advance)
    elif isinstance(content, MergedExperts):
        raise AssertionError("a plan has the matrices of a stack one by one")
    elif is_transposed(content.updates[0][1].kind):
        _write_transposed(fd, entry, content, dtype, advance)
    else:
        _write_merged(fd, entry, content, dtype, advance)


def _write_converted(fd: int, entry: TensorEntry, content: Copied, dtype: torch.dtype, advance: Advance) -> None:
    if not entry.shape:
        write_tensor(fd, content.file.read().to(dtype), entry.start)
        advance(entry.nbytes)
        return
    row_bytes = entry.nbytes // max(1, entry.shape[0])
    step = max(1, CHUNK_ELEMENTS * dtype.itemsize // max(1, row_bytes))
    for rows, values in content.file.rows(step):
        write_tensor(fd, values.to(dtype), entry.start + rows.start * row_bytes)
        advance((rows.stop - rows.start) * row_bytes)


def _write_merged(fd: int, entry: TensorEntry, content: Merged, dtype: torch.dtype, advance: Advance) -> None:
    """Slice by slice through one buffer: allocating memory per slice would cost more than the arithmetic."""
    row_bytes = entry.nbytes // entry.shape[0]
    buffer = torch.empty((content.updates[0][1].slice_rows, *entry.shape[1:]), dtype=dtype)
    for rows, merged in _merged_rows(content):
        rounded = buffer[: rows.stop - rows.start]
        rounded.copy_(merged.view(rounded.shape))
        _require_finite(rounded, entry, content)
        write_tensor(fd, rounded, entry.start + rows.start * row_bytes)
        advance((rows.stop - rows.start) * row_bytes)


def _write_transposed(fd: int, entry: TensorEntry, content: Merged, dtype: torch.dtype, advance: Advance) -> None:
    """Rows of the matrix are columns in the file: collect them, then write once."""
    stored = torch.empty(entry.shape, dtype=dtype)
    _fill(stored, content)
    _require_finite(stored, entry, content)
    write_tensor(fd, stored, entry.start)
    advance(entry.nbytes)


@torch.no_grad()
def merged_values(module: BoundModule, out: Tensor) -> None:
    """Fill `out`, of the stored weight's shape and dtype, with the values that a merge of this adapter alone writes.

    Raises:
        NonFiniteError: a value is not finite in that dtype.
    """
    content = Merged(((1.0, module),))
    _fill(out, content)
    _require_finite(out, module.file.entry, content)


def _fill(stored: Tensor, content: Merged) -> None:
    matrix = to_matrix(stored, content.updates[0][1].kind)
    for rows, merged in _merged_rows(content):
        matrix[rows] = merged.to(stored.dtype)


def _require_finite(values: Tensor, entry: TensorEntry, content: Merged) -> None:
    """Refuse merged values that are infinite or NaN in the dtype of the output."""
    # One pass over the data: a sum of finite values is finite in float64, unless the values themselves are float64.
    if math.isfinite(float(values.sum(dtype=torch.float64))) or bool(values.isfinite().all()):
        return
    module = content.updates[0][1]
    raise NonFiniteError(
        f"{module.file.path}: {entry.key}: merged with the adapter's {module.name} it is not finite in {entry.dtype}"
    )


def _merged_rows(content: Merged) -> Iterator[tuple[slice, Tensor]]:
    """Merged rows in float64. One adapter of weight 1 gives W'; else W0 + sum of weight * (W' - W0).

    The rows of one slice are overwritten by those of the next.
    """
    updates = [(weight, module.double()) for weight, module in content.updates]
    weight, first = updates[0]
    memory, total = (torch.empty((first.slice_rows, first.factors.sizes[1]), dtype=torch.float64) for _ in range(2))
    for rows, base in first.weight_rows():
        size = rows.stop - rows.start
        if weight == 1.0 and len(updates) == 1:
            yield rows, first.merged_rows(base, rows, out=memory[:size])
        else:
            yield rows, _weighted(updates, base, rows, memory[:size], total[:size])


def _weighted(
    updates: Sequence[tuple[float, BoundModule]], base: Tensor, rows: slice, memory: Tensor, total: Tensor
) -> Tensor:
    total.copy_(base)
    for weight, module in updates:
        total.add_(module.merged_rows(base, rows, out=memory).sub_(base), alpha=weight)
    return total
