"""Sums and products of half-precision tensors in float32 (float64 where an operand is), without whole wide copies."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "row_chunks", "squared_row_norms", "wide_product", "wide_transposed_product"]

UPCAST_BYTES = 64 * 2**20
"""Most memory that the wider copy of a half-precision weight takes at a time, in bytes."""

_CACHED_BYTES = 2**18
"""Most memory that squares take at a time on a CPU, in bytes.

So few squares stay in the cache, where they cost a tenth of their time in fresh memory. Larger blocks, freed between
the parameters of a new adapter, would leave holes of their size in the allocator's heap.
"""


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums over these tensors: float64 if any of them is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_chunks(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices of rows whose copy in ``dtype`` stays under the memory bound; one slice if no copy is needed."""
    return [slice(0, weight.shape[0])] if weight.dtype == dtype else _chunks(weight, dtype, UPCAST_BYTES)


def _chunks(weight: Tensor, dtype: torch.dtype, most: int) -> list[slice]:
    rows, step = weight.shape[0], max(1, most // max(1, weight.shape[1] * dtype.itemsize))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def squared_row_norms(weight: Tensor) -> Tensor:
    """Sum of squares of each row of ``[m, k]``, ``[m]`` in :func:`accumulation_dtype`."""
    dtype = accumulation_dtype(weight)
    chunks = _chunks(weight, dtype, _CACHED_BYTES if weight.device.type == "cpu" else UPCAST_BYTES)
    return torch.cat([weight[rows].to(dtype).square().sum(1) for rows in chunks])


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in :func:`accumulation_dtype`; of a narrower left operand no whole wide copy is made.

    Args:
        left: ``[m, k]``.
        right: ``[k, n]``.

    Returns:
        ``[m, n]``.
    """
    dtype = accumulation_dtype(left, right)
    right = right.to(dtype)
    chunks = row_chunks(left, dtype)
    if len(chunks) == 1:
        return left.to(dtype) @ right
    return torch.cat([left[rows].to(dtype) @ right for rows in chunks])


def wide_transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right`` in :func:`accumulation_dtype`; of a narrower right operand no whole wide copy is made.

    Args:
        left: ``[k, m]``.
        right: ``[k, n]``, such as W0.

    Returns:
        ``[m, n]``.
    """
    dtype = accumulation_dtype(left, right)
    if right.dtype == dtype:
        return left.T.to(dtype) @ right
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=dtype)
    for rows in row_chunks(right, dtype):
        total.addmm_(left[rows].T.to(dtype), right[rows].to(dtype))
    return total
