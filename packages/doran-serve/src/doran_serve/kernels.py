"""LoRA's two products and the output scale in two Triton kernels, for the slots of a mixed batch. Imports Triton.

`shrink` computes `h = A x` of every token, cut along d_in into partial sums; `expand` adds the partial sums up and
writes `y = c * (y + B h) + (1 - c) * bias` over the base layer's output, in one read and one write of it. vLLM's own
pair clears its buffer in a third launch, sums with atomics in any order, and takes half precision only.

Programs are dealt out by token block, not by slot: tokens come sorted by slot, and each program finds the slot of its
block from the tokens per slot. So the grid depends on the number of tokens and slots alone, and a CUDA graph may be
replayed with any other mix. A compiled kernel depends on the layer and on one of two tile sizes alone, for few and for
many tokens. The engine's trial runs at its start compile both, so no request waits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from doran_serve.tile_config import ExpandConfig, ShrinkConfig, expand_config, shrink_config, token_blocks

__all__ = ["column_blocks", "expand", "shrink"]


def column_blocks(sizes: tuple[int, ...], columns: int, device: torch.device | str) -> Tensor:
    """The range of each column program of `expand`: `[blocks, 3]` int32 of projection, first column, end."""
    rows, start = [], 0
    for index, size in enumerate(sizes):
        rows += [(index, first, start + size) for first in range(start, start + size, columns)]
        start += size
    return torch.tensor(rows, dtype=torch.int32, device=device)


@triton.jit  # type: ignore[untyped-decorator]
def _find_block(pid, ids, counts, starts, groups, GROUPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(slot or -1, sorted positions [BLOCK], which of them are tokens) of token block `pid`."""
    index = tl.arange(0, GROUPS)
    slots = tl.load(ids + index, mask=index < groups, other=-1)
    sizes = tl.load(counts + index, mask=index < groups, other=0)
    blocks = tl.where(slots >= 0, (sizes + BLOCK - 1) // BLOCK, 0)
    ends = tl.cumsum(blocks, 0)
    here = (ends > pid) & (ends - blocks <= pid)
    found = tl.sum(here.to(tl.int32), 0)
    slot = tl.sum(tl.where(here, slots, 0), 0) + found - 1
    size = tl.sum(tl.where(here, sizes, 0), 0)
    start = tl.sum(tl.where(here, tl.load(starts + index, mask=index < groups, other=0), 0), 0)
    offset = (pid - tl.sum(tl.where(here, ends - blocks, 0), 0)) * BLOCK + tl.arange(0, BLOCK)
    return slot, start + offset, offset < size  # no slot found: size 0


@triton.jit(do_not_specialize=["tokens", "groups"])  # type: ignore[untyped-decorator]
def _shrink_kernel(  # type: ignore[no-untyped-def]
    x,
    a,
    h,
    order,
    ids,
    counts,
    starts,
    tokens,
    groups,
    d_in,
    part,
    x_stride,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    slot, position, valid = _find_block(tl.program_id(0), ids, counts, starts, groups, GROUPS, TOKENS)
    if slot < 0:
        return
    row = tl.load(order + position, mask=valid, other=0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, d_in)
    a_rows = a + slot.to(tl.int64) * WIDTH * d_in + column.to(tl.int64)[:, None] * d_in
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for k in range(first, last, DEPTH):
        depth = k + tl.arange(0, DEPTH)
        inside = depth < last
        left = tl.load(x + row[:, None] * x_stride + depth[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        right = tl.load(a_rows + depth[None, :], mask=(column < WIDTH)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(left, tl.trans(right.to(left.dtype)), total, input_precision="ieee")
    target = h + (tl.program_id(2).to(tl.int64) * tokens + position[:, None]) * WIDTH + column[None, :]
    tl.store(target, total, mask=valid[:, None] & (column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["tokens", "groups", "split"])  # type: ignore[untyped-decorator]
def _expand_kernel(  # type: ignore[no-untyped-def]
    h,
    b,
    scale,
    bias,
    y,
    order,
    ids,
    counts,
    starts,
    blocks,
    tokens,
    groups,
    d_out,
    y_stride,
    split,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    slot, position, valid = _find_block(tl.program_id(0), ids, counts, starts, groups, GROUPS, TOKENS)
    if slot < 0:
        return
    row = tl.load(order + position, mask=valid, other=0).to(tl.int64)
    projection = tl.load(blocks + tl.program_id(1) * 3)
    column = tl.load(blocks + tl.program_id(1) * 3 + 1) + tl.arange(0, COLUMNS)
    inside = column < tl.load(blocks + tl.program_id(1) * 3 + 2)
    b_rows = b + (slot.to(tl.int64) * d_out + column.to(tl.int64)[:, None]) * RANK
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for first in range(0, RANK, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        left = tl.zeros((TOKENS, DEPTH), dtype=tl.float32)
        for part in range(split):
            source = h + (part * tokens + position[:, None]).to(tl.int64) * WIDTH + projection * RANK + depth[None, :]
            left += tl.load(source, mask=valid[:, None] & (depth < RANK)[None, :], other=0.0)
        right = tl.load(b_rows + depth[None, :], mask=inside[:, None] & (depth < RANK)[None, :], other=0.0)
        rounded = left.to(right.dtype)
        total = tl.dot(rounded, tl.trans(right), total, input_precision="ieee")
        if right.dtype != tl.float32:  # what rounding h to half precision has lost
            total = tl.dot((left - rounded.to(tl.float32)).to(right.dtype), tl.trans(right), total)
    c = tl.load(scale + slot.to(tl.int64) * d_out + column, mask=inside, other=1.0)[None, :]
    target = y + row[:, None] * y_stride + column[None, :]
    mask = valid[:, None] & inside[None, :]
    result = c * (tl.load(target, mask=mask, other=0.0).to(tl.float32) + total)
    if HAS_BIAS:
        result += (1.0 - c) * tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(target, result.to(y.dtype.element_ty), mask=mask)


def shrink(
    x: Tensor,
    a: Tensor,
    order: Tensor,
    ids: Tensor,
    counts: Tensor,
    starts: Tensor,
    config: ShrinkConfig | None = None,
) -> Tensor:
    """Partial sums of `A x` for every token that has a slot.

    Args:
        x: `[n, d_in]`, rows contiguous.
        a: `[slots, width, d_in]` contiguous; width is all projections' ranks, one after the other.
        order: `[>= n]` int32: token indices sorted by slot.
        ids: `[slots + 1]` int32: the slots in use in that order, -1 for no adapter and where there are no more.
        counts: `[slots + 1]` int32: tokens of each entry of `ids`.
        starts: `[>= slots + 1]` int32: where they start in `order`.
        config: tile sizes; by `shrink_config` if None.

    Returns:
        `[split, n, width]` float32, the second dimension in the order of `order`; rows of tokens without a slot are
        not written.
    """
    n, d_in = x.shape
    slots, width, _ = a.shape
    config = config or shrink_config(n, slots, width, d_in, x.dtype)
    part = triton.cdiv(triton.cdiv(d_in, config.split), config.depth) * config.depth
    split = triton.cdiv(d_in, part)
    h = torch.empty(split, n, width, dtype=torch.float32, device=x.device)
    grid = (token_blocks(n, slots, config.tokens), triton.cdiv(width, config.columns), split)
    _shrink_kernel[grid](
        *(x, a, h, order, ids, counts, starts, n, ids.shape[0], d_in, part, x.stride(0)),
        WIDTH=width,
        GROUPS=triton.next_power_of_2(ids.shape[0]),
        TOKENS=config.tokens,
        COLUMNS=config.columns,
        DEPTH=config.depth,
        **_launch(config),
    )
    return h


def expand(
    h: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    order: Tensor,
    ids: Tensor,
    counts: Tensor,
    starts: Tensor,
    blocks: Tensor,
    config: ExpandConfig | None = None,
) -> None:
    """`y = c * (y + B h) + (1 - c) * bias` in place for every token that has a slot; the others are not touched.

    Args:
        h: `[split, n, width]` from `shrink`.
        b: `[slots, d_out, r]` contiguous.
        scale: c, `[>= slots, d_out]` float32 contiguous.
        bias: `[d_out]` the bias that is in y, or None.
        y: `[n, d_out]`, rows contiguous.
        order: with `ids`, `counts` and `starts` as for `shrink`.
        ids: see `order`.
        counts: see `order`.
        starts: see `order`.
        blocks: from `column_blocks` for this configuration's `columns`.
        config: tile sizes; by `expand_config` if None.
    """
    split, n, width = h.shape
    slots, d_out, rank = b.shape
    config = config or expand_config(n, rank, y.dtype)
    grid = (token_blocks(n, slots, config.tokens), blocks.shape[0])
    _expand_kernel[grid](
        *(h, b, scale, bias if bias is not None else scale, y, order, ids, counts, starts, blocks),
        *(n, ids.shape[0], d_out, y.stride(0), split),
        WIDTH=width,
        RANK=rank,
        HAS_BIAS=bias is not None,
        GROUPS=triton.next_power_of_2(ids.shape[0]),
        TOKENS=config.tokens,
        COLUMNS=config.columns,
        DEPTH=config.depth,
        **_launch(config),
    )


def _launch(config: ShrinkConfig | ExpandConfig) -> dict[str, Any]:
    return {"num_warps": config.warps, "num_stages": config.stages}
