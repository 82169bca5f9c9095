"""Triton kernels: one pass over memory each. Imports Triton, so nothing imports this at start-up.

Arithmetic is float32; half precision is only loaded and stored. Sizes are masked, so any will do. The offset of a block
is 64-bit, so that large batches do not overflow; those inside it are not, which is what keeps them cheap. WIDEN is for
Triton's interpreter, which cannot multiply bfloat16. Kernels over the N layers of a shape have the layer as the grid's
last dimension and find its W0, in half precision, through ``table``, int64 addresses, multiples of 16; all else lies in
``[N, ...]``.
"""

# Triton reads types from the arguments, and `tl.constexpr` marks what is known at compile time.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, type-arg"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "expand_kernel",
    "expert_rows_gradient_kernel",
    "expert_rows_kernel",
    "row_scales_kernel",
    "scale_gradient_kernel",
    "weight_product_kernel",
]


@triton.jit
def expand_kernel(
    base_output, hidden, B, scale, bias, y, tokens, d_out, rank,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y = c (z + h B^T) + (1 - c) bias``; y may be z."""
    first = tl.program_id(1).to(tl.int64) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_ok, column_ok = rows < tokens - first, columns < d_out
    at = rows[:, None] * d_out + columns[None, :]
    mask = row_ok[:, None] & column_ok[None, :]
    # The large load first: the small ones below wait in its shadow.
    z = tl.load(base_output + first * d_out + at, mask, 0.0)
    c = tl.load(scale + columns, column_ok, 0.0)
    delta = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        rank_ok = ranks < rank
        h = tl.load(
            hidden + first * rank + rows[:, None] * rank + ranks[None, :], row_ok[:, None] & rank_ok[None, :], 0.0
        )
        b = tl.load(B + columns[None, :] * rank + ranks[:, None], column_ok[None, :] & rank_ok[:, None], 0.0)
        if WIDEN:
            h, b = h.to(tl.float32), b.to(tl.float32)
        delta = tl.dot(h, b, delta, input_precision=PRECISION)
    result = c[None, :] * (z.to(tl.float32) + delta)
    if HAS_BIAS:
        result += ((1.0 - c) * tl.load(bias + columns, column_ok, 0.0).to(tl.float32))[None, :]
    tl.store(y + first * d_out + at, result.to(y.dtype.element_ty), mask)


@triton.jit
def scale_gradient_kernel(
    grad, kept, scale, bias, scaled, sums, tokens, d_out, rows_per_part,
    HAS_BIAS: tl.constexpr, IS_OUTPUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``c G``, and per part of the tokens the sums of ``G (kept - bias)``, over c if kept is y."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_ok = columns < d_out
    c = tl.load(scale + columns, column_ok, 1.0)
    shift = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + columns, column_ok, 0.0).to(tl.float32)
    part = tl.program_id(1).to(tl.int64)
    end = tl.minimum((part + 1) * rows_per_part, tokens)
    total = tl.zeros([BLOCK_D], tl.float32)
    rows = tl.arange(0, BLOCK_T)
    at = rows[:, None] * d_out + columns[None, :]
    for first in range(part * rows_per_part, end, BLOCK_T):
        mask = (rows < end - first)[:, None] & column_ok[None, :]
        skipped = first * d_out
        g = tl.load(grad + skipped + at, mask, 0.0).to(tl.float32)
        y = tl.load(kept + skipped + at, mask, 0.0).to(tl.float32)
        tl.store(scaled + skipped + at, (g * c[None, :]).to(scaled.dtype.element_ty), mask)
        total += tl.sum(g * (y - shift[None, :]), 0)
    if IS_OUTPUT:
        total = total / c
    tl.store(sums + part * d_out + columns, total, column_ok)


@triton.jit
def _direct_row(
    weight, A, B, row, rank, d_in, stride_row, stride_column, scaling, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """``K = V A^T`` and ``||V||^2`` of one row from ``V = W0 + g B A`` itself."""
    ranks = tl.arange(0, BLOCK_R)
    rank_ok = ranks < rank
    b = scaling * tl.load(B + row * rank + ranks, rank_ok, 0.0)
    weight += row.to(tl.int64) * stride_row
    total, along = tl.zeros([BLOCK_K], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, d_in, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        column_ok = columns < d_in
        a = tl.load(A + ranks[:, None] * d_in + columns[None, :], rank_ok[:, None] & column_ok[None, :], 0.0)
        a = a.to(tl.float32)
        v = tl.load(weight + columns * stride_column, column_ok, 0.0).to(tl.float32) + tl.sum(b[:, None] * a, 0)
        total += v * v
        along += tl.sum(a * v[None, :], 1)
    return along, tl.sum(total, 0)


@triton.jit
def row_scales_kernel(
    table, A, B, squared_norm, magnitude, tau, aligned, norm, scale,
    d_out, rank, d_in, stride_row, stride_column, scaling, threshold,
    TAU_PER_ROW: tl.constexpr, REPAIR: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """K, n and c of a block of rows of a layer: one pass over W0 makes U, and ``A A^T`` beside.

    One block holds the rank. REPAIR takes K and n anew, from V, for rows that cancel.
    """
    layer = tl.program_id(1).to(tl.int64)
    weight = tl.multiple_of(tl.load(table + layer).to(tl.pointer_type(A.dtype.element_ty)), 16)
    A, B, aligned = A + layer * rank * d_in, B + layer * d_out * rank, aligned + layer * d_out * rank
    rows = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = rows < d_out
    ranks = tl.arange(0, BLOCK_R)
    rank_ok = ranks < rank
    weight_rows = weight + rows.to(tl.int64)[:, None] * stride_row
    u = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    gram = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    for start in range(0, d_in, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        column_ok = columns < d_in
        w = tl.load(weight_rows + columns[None, :] * stride_column, valid[:, None] & column_ok[None, :], 0.0)
        a = tl.load(A + ranks[:, None] * d_in + columns[None, :], rank_ok[:, None] & column_ok[None, :], 0.0)
        if WIDEN:
            w, a = w.to(tl.float32), a.to(tl.float32)
        u = tl.dot(w, tl.trans(a), u)
        gram = tl.dot(a, tl.trans(a), gram)
    at = rows[:, None] * rank + ranks[None, :]
    mask = valid[:, None] & rank_ok[None, :]
    b = tl.load(B + at, mask, 0.0)
    k = u + scaling * tl.dot(b, gram, input_precision="ieee")
    tl.store(aligned + at, k, mask)
    inner = tl.sum(b * (u + k), 1)
    base = tl.load(squared_norm + layer * d_out + rows, valid, 0.0)
    square = base + scaling * inner
    if REPAIR:
        lost = valid & (square < threshold * threshold * base)
        if tl.max(lost.to(tl.int32), 0) > 0:
            tl.debug_barrier()  # K was stored by other threads than those that store it below
            for index in range(BLOCK_D):
                here = tl.arange(0, BLOCK_D) == index
                if tl.max((here & lost).to(tl.int32), 0) > 0:
                    row = tl.program_id(0) * BLOCK_D + index
                    along, length = _direct_row(
                        weight, A, B, row, rank, d_in, stride_row, stride_column, scaling, BLOCK_R, BLOCK_K
                    )
                    tl.store(aligned + row * rank + ranks, along, rank_ok)
                    square = tl.where(here, length, square)
    positive = square > 0
    n = tl.where(positive, tl.sqrt_rn(tl.where(positive, square, 1.0)), 0.0)
    if TAU_PER_ROW:
        denominator = n + tl.load(tau + layer * d_out + rows, valid, 0.0)
    else:
        denominator = n + tl.load(tau + layer)
    m = tl.load(magnitude + layer * d_out + rows, valid, 0.0)
    positive = denominator > 0
    c = tl.where(positive, tl.div_rn(m, tl.where(positive, denominator, 1.0)), 0.0)
    tl.store(norm + layer * d_out + rows, n, valid)
    tl.store(scale + layer * d_out + rows, c, valid)


@triton.jit
def weight_product_kernel(
    table, left, out, d_out, d_in, rank, rows_per_part, stride_row, stride_column,
    WIDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``M^T W0`` in parts, ``[N, parts, r, d_in]``. One block holds the rank."""
    part, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    ranks, columns = tl.arange(0, BLOCK_R), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    rank_ok, column_ok = ranks < rank, columns < d_in
    weight = tl.multiple_of(tl.load(table + layer).to(tl.pointer_type(left.dtype.element_ty)), 16)
    left += layer * d_out * rank
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    end = tl.minimum((part + 1) * rows_per_part, d_out)
    for first in range(part * rows_per_part, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        row_ok = rows < end
        m = tl.load(left + rows[:, None] * rank + ranks[None, :], row_ok[:, None] & rank_ok[None, :], 0.0)
        w = tl.load(
            weight + rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column,
            row_ok[:, None] & column_ok[None, :], 0.0,
        )  # fmt: skip
        if WIDEN:
            m, w = m.to(tl.float32), w.to(tl.float32)
        total = tl.dot(tl.trans(m), w, total)
    out += (layer * tl.num_programs(1) + part) * rank * d_in
    tl.store(out + ranks[:, None] * d_in + columns[None, :], total, rank_ok[:, None] & column_ok[None, :])


@triton.jit
def _rows_of_part(ends, tokens):
    """The first of a part of the rows of an expert, and the end; rows after the last end are the last expert's."""
    expert, part, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    begin = tl.load(ends + expert - 1, expert > 0, 0).to(tl.int64)
    end = tl.load(ends + expert).to(tl.int64)
    if expert == tl.num_programs(1) - 1:
        end = tl.maximum(end, tokens)
    size = tl.cdiv(end - begin, parts)
    return begin + part * size, tl.minimum(begin + (part + 1) * size, end)


@triton.jit
def expert_rows_kernel(
    base_output, delta, scale, ends, y, tokens, d_out, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """``y = c z + delta`` with the c of each row's expert."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_ok = columns < d_out
    c = tl.load(scale + tl.program_id(1).to(tl.int64) * d_out + columns, column_ok, 0.0)
    rows = tl.arange(0, BLOCK_T)
    at = rows[:, None] * d_out + columns[None, :]
    first, end = _rows_of_part(ends, tokens)
    for start in range(first, end, BLOCK_T):
        mask = (rows < end - start)[:, None] & column_ok[None, :]
        skipped = start * d_out
        z = tl.load(base_output + skipped + at, mask, 0.0).to(tl.float32)
        result = c[None, :] * z + tl.load(delta + skipped + at, mask, 0.0).to(tl.float32)
        tl.store(y + skipped + at, result.to(y.dtype.element_ty), mask)


@triton.jit
def expert_rows_gradient_kernel(
    grad, base_output, scale, ends, scaled, sums, tokens, d_out, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """``c G``, and the sums of ``G z`` over parts of each expert's rows, ``[parts, experts, d_out]``."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_ok = columns < d_out
    expert = tl.program_id(1).to(tl.int64)
    c = tl.load(scale + expert * d_out + columns, column_ok, 0.0)
    total = tl.zeros([BLOCK_D], tl.float32)
    rows = tl.arange(0, BLOCK_T)
    at = rows[:, None] * d_out + columns[None, :]
    first, end = _rows_of_part(ends, tokens)
    for start in range(first, end, BLOCK_T):
        mask = (rows < end - start)[:, None] & column_ok[None, :]
        skipped = start * d_out
        g = tl.load(grad + skipped + at, mask, 0.0).to(tl.float32)
        z = tl.load(base_output + skipped + at, mask, 0.0).to(tl.float32)
        tl.store(scaled + skipped + at, (g * c[None, :]).to(scaled.dtype.element_ty), mask)
        total += tl.sum(g * z, 0)
    at_sum = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + expert) * d_out
    tl.store(sums + at_sum + columns, total, column_ok)
