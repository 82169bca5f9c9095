"""Triton kernels: the passes of passes.py as single kernels. Imports Triton, so nothing imports this at start-up.

Arithmetic is float32; half precision is only loaded and stored. Sizes are masked, so any will do. The offset of a block
is 64-bit, so that large batches do not overflow; those inside it are not, which is what keeps them cheap. WIDEN is for
Triton's interpreter, which cannot multiply bfloat16.
"""

# Triton reads types from the arguments, and `tl.constexpr` marks what is known at compile time.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, type-arg"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "assemble_kernel",
    "assemble_over_product",
    "assemble_whole_kernel",
    "expand_kernel",
    "finish_kernel",
    "gradient_of_A_kernel",
    "scale_gradient_kernel",
]


@triton.jit
def _direct_row(weight, A, B, row, rank, d_in, stride_row, stride_column, scaling, first, BLOCK_R, BLOCK_K):
    """``V[row, first : first + BLOCK_K]`` of ``W0 + g B A``, masked beyond d_in."""
    columns = first + tl.arange(0, BLOCK_K)
    inside = columns < d_in
    values = tl.load(weight + row.to(tl.int64) * stride_row + columns * stride_column, inside, 0.0).to(tl.float32)
    for start in range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        b = tl.load(B + row * rank + ranks, ranks < rank, 0.0)
        mask = (ranks < rank)[:, None] & inside[None, :]
        a = tl.load(A + ranks[:, None] * d_in + columns[None, :], mask, 0.0).to(tl.float32)
        values += scaling * tl.sum(b[:, None] * a, 0)
    return values


@triton.jit
def _norm_and_scale(
    aligned, B, squared_norm, magnitude, tau, weight, A, norm, scale, scaled_B, rows, valid, inner,
    rank, d_in, stride_row, stride_column, scaling, threshold,
    TAU_PER_ROW: tl.constexpr, REPAIR: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """n, c and B' from ``inner = sum(B * (U + K), 1)``; takes n and K anew, from V, for rows that cancel. Returns c."""
    base = tl.load(squared_norm + rows, valid, 0.0)
    square = base + scaling * inner
    if REPAIR:
        lost = valid & (square < threshold * threshold * base)
        if tl.max(lost.to(tl.int32), 0) > 0:
            tl.debug_barrier()  # K was stored by other threads than those that store it below
            for index in range(BLOCK_D):
                here = tl.arange(0, BLOCK_D) == index
                if tl.max((here & lost).to(tl.int32), 0) > 0:
                    row = tl.program_id(0) * BLOCK_D + index
                    total = tl.zeros([BLOCK_K], tl.float32)
                    for first in range(0, d_in, BLOCK_K):
                        v = _direct_row(
                            weight, A, B, row, rank, d_in, stride_row, stride_column, scaling, first, BLOCK_R, BLOCK_K
                        )
                        total += v * v
                    square = tl.where(here, tl.sum(total, 0), square)
                    for start in range(0, rank, BLOCK_R):
                        ranks = start + tl.arange(0, BLOCK_R)
                        along = tl.zeros([BLOCK_R], tl.float32)
                        for first in range(0, d_in, BLOCK_K):
                            v = _direct_row(
                                weight, A, B, row, rank, d_in, stride_row, stride_column, scaling, first,
                                BLOCK_R, BLOCK_K,
                            )  # fmt: skip
                            columns = first + tl.arange(0, BLOCK_K)
                            mask = (ranks < rank)[:, None] & (columns < d_in)[None, :]
                            a = tl.load(A + ranks[:, None] * d_in + columns[None, :], mask, 0.0).to(tl.float32)
                            along += tl.sum(a * v[None, :], 1)
                        tl.store(aligned + row * rank + ranks, along, ranks < rank)
    positive = square > 0
    n = tl.where(positive, tl.sqrt_rn(tl.where(positive, square, 1.0)), 0.0)
    if TAU_PER_ROW:
        denominator = n + tl.load(tau + rows, valid, 0.0)
    else:
        denominator = n + tl.load(tau)
    m = tl.load(magnitude + rows, valid, 0.0)
    positive = denominator > 0
    c = tl.where(positive, tl.div_rn(m, tl.where(positive, denominator, 1.0)), 0.0)
    tl.store(norm + rows, n, valid)
    tl.store(scale + rows, c, valid)
    factor = c * scaling
    for start in range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        at = rows[:, None] * rank + ranks[None, :]
        mask = valid[:, None] & (ranks < rank)[None, :]
        b = tl.load(B + at, mask, 0.0)
        tl.store(scaled_B + at, (factor[:, None] * b).to(scaled_B.dtype.element_ty), mask)
    return c


@triton.jit
def assemble_over_product(
    product, gram, B, squared_norm, magnitude, tau, weight, A, norm, scale, scaled_B,
    d_out, rank, d_in, stride_row, stride_column, scaling, threshold,
    TAU_PER_ROW: tl.constexpr, REPAIR: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """K over U, then n, c and B' of a block of rows; ``gram`` is ``B (A A^T)``. Returns the c."""
    rows = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = rows < d_out
    inner = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        at = rows[:, None] * rank + ranks[None, :]
        mask = valid[:, None] & (ranks < rank)[None, :]
        u = tl.load(product + at, mask, 0.0)
        b = tl.load(B + at, mask, 0.0)
        k = u + scaling * tl.load(gram + at, mask, 0.0)
        inner += tl.sum(b * (u + k), 1)
        tl.store(product + at, k, mask)
    return _norm_and_scale(
        product, B, squared_norm, magnitude, tau, weight, A, norm, scale, scaled_B, rows, valid, inner,
        rank, d_in, stride_row, stride_column, scaling, threshold,
        TAU_PER_ROW, REPAIR, BLOCK_D, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@triton.jit
def assemble_kernel(
    product, gram, B, squared_norm, magnitude, tau, weight, A, norm, scale, scaled_B,
    d_out, rank, d_in, stride_row, stride_column, scaling, threshold,
    TAU_PER_ROW: tl.constexpr, REPAIR: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """K over U, n, c and B' of a layer."""
    assemble_over_product(
        product, gram, B, squared_norm, magnitude, tau, weight, A, norm, scale, scaled_B,
        d_out, rank, d_in, stride_row, stride_column, scaling, threshold,
        TAU_PER_ROW, REPAIR, BLOCK_D, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@triton.jit
def assemble_whole(
    weight, A, B, squared_norm, magnitude, tau, aligned, norm, scale, scaled_B,
    d_out, rank, d_in, stride_row, stride_column, scaling, threshold,
    TAU_PER_ROW: tl.constexpr, REPAIR: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """K, n, c and B' of a block of rows from W0: one pass over it makes U, and ``A A^T`` beside. Returns the c.

    One block holds the rank.
    """
    rows = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, BLOCK_R)
    valid, rank_ok = rows < d_out, ranks < rank
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
        u = tl.dot(w, tl.trans(a), u, input_precision=PRECISION)
        gram = tl.dot(a, tl.trans(a), gram, input_precision=PRECISION)
    at = rows[:, None] * rank + ranks[None, :]
    mask = valid[:, None] & rank_ok[None, :]
    b = tl.load(B + at, mask, 0.0)
    k = u + scaling * tl.dot(b, gram, input_precision="ieee")
    tl.store(aligned + at, k, mask)
    inner = tl.sum(b * (u + k), 1)
    return _norm_and_scale(
        aligned, B, squared_norm, magnitude, tau, weight, A, norm, scale, scaled_B, rows, valid, inner,
        rank, d_in, stride_row, stride_column, scaling, threshold,
        TAU_PER_ROW, REPAIR, BLOCK_D, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@triton.jit
def assemble_whole_kernel(
    weight, A, B, squared_norm, magnitude, tau, aligned, norm, scale, scaled_B,
    d_out, rank, d_in, stride_row, stride_column, scaling, threshold,
    TAU_PER_ROW: tl.constexpr, REPAIR: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """K, n, c and B' of a layer."""
    assemble_whole(
        weight, A, B, squared_norm, magnitude, tau, aligned, norm, scale, scaled_B,
        d_out, rank, d_in, stride_row, stride_column, scaling, threshold,
        TAU_PER_ROW, REPAIR, PRECISION, WIDEN, BLOCK_D, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@triton.jit
def expand_kernel(
    base_output, hidden, scaled_B, scale, bias, y, tokens, d_out, rank,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y = c z + (1 - c) bias + h B'^T``; y may be z."""
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
        b = tl.load(scaled_B + columns[None, :] * rank + ranks[:, None], column_ok[None, :] & rank_ok[:, None], 0.0)
        if WIDEN:
            h, b = h.to(tl.float32), b.to(tl.float32)
        delta = tl.dot(h, b, delta, input_precision=PRECISION)
    if HAS_BIAS:
        delta += ((1.0 - c) * tl.load(bias + columns, column_ok, 0.0).to(tl.float32))[None, :]
    tl.store(y + first * d_out + at, (c[None, :] * z.to(tl.float32) + delta).to(y.dtype.element_ty), mask)


@triton.jit
def scale_gradient_kernel(
    grad, kept, scale, bias, scaled, sums, tokens, d_out, rows_per_part,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``c * grad``, and per part of the tokens the sums of ``grad * (kept - bias)``."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_ok = columns < d_out
    c = tl.load(scale + columns, column_ok, 0.0)
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
    tl.store(sums + part * d_out + columns, total, column_ok)


@triton.jit
def _base_sums(
    grad, x, weight, rows, wanted, tokens, d_out, d_in, stride_x_row, stride_x_column, stride_row, stride_column,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over tokens of ``grad * (W0 x)`` for the wanted rows of W0."""
    total = tl.zeros([BLOCK_D], tl.float32)
    weight_rows = weight + rows.to(tl.int64)[None, :] * stride_row
    for first in range(0, tokens, BLOCK_T):
        at = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = at < tokens
        product = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in range(0, d_in, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            column_ok = columns < d_in
            a = tl.load(
                x + at[:, None] * stride_x_row + columns[None, :] * stride_x_column,
                inside[:, None] & column_ok[None, :], 0.0,
            )  # fmt: skip
            w = tl.load(weight_rows + columns[:, None] * stride_column, wanted[None, :] & column_ok[:, None], 0.0)
            if WIDEN:
                a, w = a.to(tl.float32), w.to(tl.float32)
            product = tl.dot(a, w, product, input_precision=PRECISION)
        g = tl.load(grad + at[:, None] * d_out + rows[None, :], inside[:, None] & wanted[None, :], 0.0)
        total += tl.sum(g.to(tl.float32) * product, 0)
    return total


@triton.jit
def sum_over_parts(sums, parts, rows, valid, d_out, PARTS: tl.constexpr):
    """Columns ``rows`` of the sum over the first dimension of ``[parts, d_out]``."""
    part = tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & valid[None, :]
    return tl.sum(tl.load(sums + part[:, None] * d_out + rows[None, :], mask, 0.0), 0)


@triton.jit
def row_products(left, right, rows, valid, rank, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """``sum(left * right, 1)`` of these rows of ``[d_out, rank]``."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        at = rows[:, None] * rank + ranks[None, :]
        mask = valid[:, None] & (ranks < rank)[None, :]
        total += tl.sum(tl.load(left + at, mask, 0.0) * tl.load(right + at, mask, 0.0), 1)
    return total


@triton.jit
def through_scale(
    grad_scale, c, factor_grad, aligned, B, norm, tau, raw_tau, grad_B, grad_product, grad_magnitude, grad_tau,
    rows, valid, rank, rows_per_raw, scaling,
    TAU_PER_ROW: tl.constexpr, RAW_TAU: tl.constexpr, DETACH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of rows from that of c: of magnitude, tau, B, and of U."""
    n = tl.load(norm + rows, valid, 0.0)
    if TAU_PER_ROW:
        denominator = n + tl.load(tau + rows, valid, 0.0)
    else:
        denominator = n + tl.load(tau)
    positive = denominator > 0
    inverse = tl.where(positive, 1.0 / tl.where(positive, denominator, 1.0), 0.0)
    grad_magnitude_rows = grad_scale * inverse
    tl.store(grad_magnitude + rows, grad_magnitude_rows, valid)
    grad_tau_rows = -grad_magnitude_rows * c
    if RAW_TAU:
        grad_tau_rows *= tl.sigmoid(tl.load(raw_tau + rows // rows_per_raw, valid, 0.0))
    tl.store(grad_tau + rows, grad_tau_rows, valid)
    per_norm = tl.zeros([BLOCK_D], tl.float32)
    if not DETACH:
        per_norm = tl.where(n > 0, -grad_magnitude_rows * scaling / tl.where(n > 0, n, 1.0), 0.0)
    for start in range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        at = rows[:, None] * rank + ranks[None, :]
        mask = valid[:, None] & (ranks < rank)[None, :]
        p = tl.load(factor_grad + at, mask, 0.0)
        k = tl.load(aligned + at, mask, 0.0)
        tl.store(grad_B + at, (c * scaling)[:, None] * p + (per_norm * c)[:, None] * k, mask)
        if not DETACH:
            b = tl.load(B + at, mask, 0.0)
            tl.store(grad_product + at, ((per_norm * c)[:, None] * b).to(grad_product.dtype.element_ty), mask)


@triton.jit
def finish_kernel(
    sums, factor_grad, aligned, B, norm, scale, magnitude, tau, raw_tau, grad, x, weight,
    grad_B, grad_product, grad_magnitude, grad_tau,
    tokens, d_out, d_in, rank, parts, rows_per_raw, scaling, threshold,
    stride_x_row, stride_x_column, stride_row, stride_column,
    TAU_PER_ROW: tl.constexpr, RAW_TAU: tl.constexpr, OF_OUTPUT: tl.constexpr, DETACH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the parts of ``sums`` and takes the gradient through scale and norm.

    OF_OUTPUT: ``sums`` are of the layer's output, and useless where c is near 0; there x and W0 make them anew.
    """
    rows = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = rows < d_out
    total = sum_over_parts(sums, parts, rows, valid, d_out, PARTS)
    through_factors = row_products(factor_grad, B, rows, valid, rank, BLOCK_D, BLOCK_R)
    c = tl.load(scale + rows, valid, 1.0)
    grad_scale = total + scaling * through_factors
    if OF_OUTPUT:
        small = tl.abs(c) < threshold
        grad_scale = tl.where(small, grad_scale, total / tl.where(small, 1.0, c))
        if tl.max(small.to(tl.int32), 0) > 0:
            anew = _base_sums(
                grad, x, weight, rows, small, tokens, d_out, d_in,
                stride_x_row, stride_x_column, stride_row, stride_column, PRECISION, WIDEN, BLOCK_T, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            grad_scale = tl.where(small, anew + scaling * through_factors, grad_scale)
    through_scale(
        grad_scale, c, factor_grad, aligned, B, norm, tau, raw_tau, grad_B, grad_product, grad_magnitude, grad_tau,
        rows, valid, rank, rows_per_raw, scaling, TAU_PER_ROW, RAW_TAU, DETACH, BLOCK_D, BLOCK_R,
    )  # fmt: skip


@triton.jit
def gradient_of_A_kernel(
    grad_hidden, x, product_grad, weight, B, A, grad_A,
    tokens, d_out, d_in, rank, tokens_per_part, rows_per_part,
    stride_x_row, stride_x_column, stride_row, stride_column, scaling,
    DETACH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``grad_hidden^T x + M^T (W0 + g B A)`` of a part of the tokens and of W0's rows. One block holds the rank."""
    ranks, columns = tl.arange(0, BLOCK_R), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    rank_ok, column_ok = ranks < rank, columns < d_in
    part = tl.program_id(1)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    end = tl.minimum((part + 1) * tokens_per_part, tokens)
    for first in range(part * tokens_per_part, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        row_ok = rows < end
        h = tl.load(grad_hidden + rows[:, None] * rank + ranks[None, :], row_ok[:, None] & rank_ok[None, :], 0.0)
        v = tl.load(
            x + rows.to(tl.int64)[:, None] * stride_x_row + columns[None, :] * stride_x_column,
            row_ok[:, None] & column_ok[None, :], 0.0,
        )  # fmt: skip
        if WIDEN:
            h, v = h.to(tl.float32), v.to(tl.float32)
        total = tl.dot(tl.trans(h), v, total, input_precision=PRECISION)
    if not DETACH:
        mixed = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
        end = tl.minimum((part + 1) * rows_per_part, d_out)
        for first in range(part * rows_per_part, end, BLOCK_T):
            rows = first + tl.arange(0, BLOCK_T)
            row_ok = rows < end
            mask = row_ok[:, None] & rank_ok[None, :]
            m = tl.load(product_grad + rows[:, None] * rank + ranks[None, :], mask, 0.0)
            b = tl.load(B + rows[:, None] * rank + ranks[None, :], mask, 0.0)
            w = tl.load(
                weight + rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column,
                row_ok[:, None] & column_ok[None, :], 0.0,
            )  # fmt: skip
            if WIDEN:
                m, w = m.to(tl.float32), w.to(tl.float32)
            total = tl.dot(tl.trans(m), w, total, input_precision=PRECISION)
            mixed = tl.dot(tl.trans(m), b.to(m.dtype), mixed, input_precision=PRECISION)
        a = tl.load(A + ranks[:, None] * d_in + columns[None, :], rank_ok[:, None] & column_ok[None, :], 0.0)
        total += scaling * tl.dot(mixed, a.to(tl.float32), input_precision="ieee")
    tl.store(
        grad_A + (part * rank + ranks[:, None]) * d_in + columns[None, :], total, rank_ok[:, None] & column_ok[None, :]
    )
