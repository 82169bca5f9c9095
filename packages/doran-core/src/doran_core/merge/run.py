"""merge_checkpoint: adapters and a base checkpoint directory in, a merged checkpoint directory out."""

from __future__ import annotations

import errno
import math
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from doran_core.adapter import AnyAdapter, read_adapter
from doran_core.adapter.digest import directory_digest
from doran_core.checkpoint.binding import BoundAdapter, bind
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.errors import AdapterFormatError, CheckpointError, ConfigError
from doran_core.files import StrPath
from doran_core.files.atomic import writing
from doran_core.files.opening import named_errors
from doran_core.merge.plan import MergePlan, ShardPlan, make_plan
from doran_core.merge.side_files import write_side_files
from doran_core.merge.staging import Staging, open_staging
from doran_core.merge.write import ShardWriter, merge_threads
from doran_core.method.factors import FactorBuilder

__all__ = ["AdapterInput", "merge_checkpoint"]

AdapterInput = StrPath | tuple[StrPath, float]
Progress = Callable[[int, int], None]

_MERGE_FORMAT = 1  # bump this when output bytes change, so that old partial merges are not resumed
_TRIES = 10
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def merge_checkpoint(
    base_dir: StrPath,
    adapters: AdapterInput | Sequence[AdapterInput],
    out_dir: StrPath,
    *,
    dtype: torch.dtype | None = None,
    allow_base_mismatch: bool = False,
    factor_builder: FactorBuilder | None = None,
    progress: Progress | None = None,
) -> Path:
    """Merge adapters into a Hugging Face checkpoint and write the result as a new checkpoint directory.

    The merge is streamed: only a few pieces of a tensor are in memory. Adapted weights are computed in float64 and
    rounded once; all other bytes are copied, and so are config, tokenizer and other small files. The output appears
    complete, by one rename. After a kill, a call with the same arguments resumes.

    Several adapters with weights w_i give ``W0 + sum_i w_i (W'_i - W0)``. If each base weight has one adapter of
    weight 1, the result computes exactly each adapter's function. Otherwise it is a weighted sum of changes, which no
    DoRAN adapter computes, because norms do not add.

    A tied output layer gets its own weight if only one end of the tie is adapted.

    Args:
        base_dir: the checkpoint, safetensors, single or sharded.
        adapters: an adapter directory, or several, or ``(directory, weight)`` pairs.
        out_dir: the new checkpoint; must not exist, or be empty.
        dtype: floating dtype of the result; None keeps that of each tensor.
        allow_base_mismatch: accept an adapter made for base weights with another fingerprint.
        factor_builder: the one given to :func:`doran_core.adapt`, for the adapters that were trained with one.
        progress: called with (bytes written, bytes in all), possibly from another thread.

    Returns:
        `out_dir`.

    Raises:
        AdapterFormatError: an adapter is not valid.
        BaseMismatchError: an adapter was made for another base.
        CheckpointError: the base cannot be read, lacks a module or changes meanwhile, or the output cannot be written.
        NonFiniteError: a merged weight is not finite in its dtype.
        ConfigError: weights, dtype or a combination of adapters that cannot be merged.
    """
    weighted = _as_weighted(adapters)
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype}, expected one of {list(map(str, _DTYPES))} or None")
    out = Path(out_dir).resolve()
    checkpoint = Checkpoint(base_dir)

    digests = []

    def bind_one(folder: Path) -> BoundAdapter:
        adapter, digest = _read_with_digest(folder)
        digests.append(digest)
        return bind(
            adapter,
            checkpoint,
            folder,
            allow_base_mismatch=allow_base_mismatch,
            factor_builder=factor_builder,
        )

    bound = [(weight, bind_one(folder)) for folder, weight in weighted]
    with named_errors(base_dir, CheckpointError):
        plan = make_plan(checkpoint, bound, dtype)
    adapters_digests = [(digest, weight) for digest, (weight, _) in zip(digests, bound, strict=True)]
    identity = _identity(checkpoint, adapters_digests, dtype, factor_builder)
    with writing(out, CheckpointError), open_staging(out, identity) as staging:
        if not staging.finished:
            _write(checkpoint, plan, [adapter for _, adapter in bound], dtype, staging, progress)
    return Path(out_dir)


def _read_with_digest(folder: Path) -> tuple[AnyAdapter, str]:
    """An adapter, and the digest of the files that it was read from."""
    for _ in range(_TRIES):
        with named_errors(folder, AdapterFormatError):
            before = directory_digest(folder) if folder.is_dir() else ""  # read_adapter reports a missing one
        adapter = read_adapter(folder)
        if directory_digest(folder) == before:
            return adapter, before
    raise CheckpointError(f"{folder}: the adapter changes while it is read")


def _as_weighted(adapters: AdapterInput | Sequence[AdapterInput]) -> list[tuple[Path, float]]:
    single = isinstance(adapters, str | os.PathLike) or (isinstance(adapters, tuple) and _is_pair(adapters))
    items: Sequence[Any] = [adapters] if single else list(adapters)  # type: ignore[arg-type]
    if not items:
        raise ConfigError("no adapter to merge")
    weighted = [(Path(item[0]), float(item[1])) if isinstance(item, tuple) else (Path(item), 1.0) for item in items]
    for folder, weight in weighted:
        if not math.isfinite(weight):
            raise ConfigError(f"{folder}: weight {weight}, expected a finite number")
    return weighted


def _is_pair(value: tuple[Any, ...]) -> bool:
    return len(value) == 2 and isinstance(value[1], int | float)


def _identity(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[str, float]],
    dtype: torch.dtype | None,
    factor_builder: FactorBuilder | None,
) -> dict[str, Any]:
    """All inputs that decide the output's bytes, JSON-ready. A factor builder counts by name only."""
    return {
        "merge_format": _MERGE_FORMAT,
        "torch": torch.__version__,
        "dtype": str(dtype),
        "factor_builder": getattr(factor_builder, "__qualname__", type(factor_builder).__qualname__),
        "base": {str(Path(path).resolve()): state for path, state in sorted(checkpoint.state.items())},
        "adapters": [list(pair) for pair in adapters],
    }


def _write(
    checkpoint: Checkpoint,
    plan: MergePlan,
    adapters: Sequence[BoundAdapter],
    dtype: torch.dtype | None,
    staging: Staging,
    progress: Progress | None,
) -> None:
    todo = [shard for shard in plan.shards if not staging.is_done(shard.name, shard.nbytes)]
    counter = _Counter(sum(shard.nbytes for shard in plan.shards), progress)
    counter.advance(counter.total - sum(shard.nbytes for shard in todo))
    _check_space(staging.root, sum(shard.nbytes for shard in todo))
    _write_shards(todo, staging, counter)
    write_side_files(checkpoint, plan, adapters, dtype, staging)
    checkpoint.require_unchanged()
    staging.publish()


def _write_shards(shards: Sequence[ShardPlan], staging: Staging, counter: _Counter) -> None:
    """Write shards in order. While one is synced, the next is computed."""
    running: list[ShardWriter] = []

    def finish_first() -> None:
        running[0].finish()
        staging.complete(running.pop(0).name)

    with merge_threads() as pool:
        try:
            for shard in shards:
                running.append(ShardWriter(shard, staging.part(shard.name), pool, counter.advance))
                if len(running) > 1:
                    finish_first()
            while running:
                finish_first()
        except BaseException:
            for writer in running:
                writer.abandon()
            raise


def _check_space(root: Path, needed: int) -> None:
    leftovers = sum(path.stat().st_size for path in root.rglob("*.part"))
    free = shutil.disk_usage(root).free + leftovers
    if free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Counter:
    """Bytes done, counted from several threads."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self.total)
