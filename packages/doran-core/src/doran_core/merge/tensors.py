"""Tensors of a checkpoint, merged in memory as `doran merge` writes them, for a program that holds a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from doran_core.checkpoint.binding import BoundModule
from doran_core.files.layout import DTYPES
from doran_core.merge.write import merge_threads, merged_values

__all__ = ["base_tensors", "merged_tensors"]


def base_tensors(modules: Sequence[BoundModule]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's keys and tensors that the modules adapt, unchanged.

    Args:
        modules: of one adapter; of a tensor that holds all experts, every expert.
    """
    return _tensors(modules, lambda module, out: out.copy_(module.file.read()))


def merged_tensors(modules: Sequence[BoundModule]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors with the adapter merged into them, in the checkpoint's dtype and layout.

    Raises:
        NonFiniteError: a merged value is not finite in that dtype.
    """
    return _tensors(modules, merged_values)


def _tensors(
    modules: Sequence[BoundModule], fill: Callable[[BoundModule, Tensor], object]
) -> Iterator[tuple[str, Tensor]]:
    keys: dict[str, list[BoundModule]] = {}
    for module in modules:
        keys.setdefault(module.key, []).append(module)
    with merge_threads() as pool:
        for key, parts in keys.items():
            entry = parts[0].file.entry
            memory = torch.empty((len(parts), *entry.shape), dtype=DTYPES[entry.dtype])
            list(pool.map(fill, parts, memory))
            yield key, memory[0] if parts[0].slot is None else memory
