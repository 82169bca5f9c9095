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
    "expand_kernel",
    "finish_kernel",
    "generate_inner_gradient_kernel",
    "generate_kernel",
    "generate_outer_gradient_kernel",
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
def assemble_kernel(
    product, gram, B, squared_norm, magnitude, tau, weight, A, norm, scale, scaled_B,
    d_out, rank, d_in, stride_row, stride_column, scaling, threshold,
    TAU_PER_ROW: tl.constexpr, REPAIR: tl.constexpr, WHOLE_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """K over U, then n, c and B'. ``gram`` is ``A A^T`` if one block holds the rank, else ``B (A A^T)``."""
    rows = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = rows < d_out
    inner = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        at = rows[:, None] * rank + ranks[None, :]
        mask = valid[:, None] & (ranks < rank)[None, :]
        u = tl.load(product + at, mask, 0.0)
        b = tl.load(B + at, mask, 0.0)
        if WHOLE_RANK:
            pair_ok = (ranks < rank)[:, None] & (ranks < rank)[None, :]
            g = tl.load(gram + ranks[:, None] * rank + ranks[None, :], pair_ok, 0.0)
            k = u + scaling * tl.dot(b, g, input_precision="ieee")
        else:
            k = u + scaling * tl.load(gram + at, mask, 0.0)
        inner += tl.sum(b * (u + k), 1)
        tl.store(product + at, k, mask)
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
                        tl.store(product + row * rank + ranks, along, ranks < rank)
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
def finish_kernel(
    sums, factor_grad, aligned, B, norm, scale, magnitude, tau, grad, x, weight,
    grad_B, grad_product, grad_gram, grad_magnitude, grad_tau,
    tokens, d_out, d_in, rank, parts, scaling, threshold,
    stride_x_row, stride_x_column, stride_row, stride_column,
    TAU_PER_ROW: tl.constexpr, OF_OUTPUT: tl.constexpr, DETACH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the parts of ``sums`` and takes the gradient through scale and norm.

    OF_OUTPUT: ``sums`` are of the layer's output, and useless where c is near 0; there x and W0 make them anew.
    """
    rows = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = rows < d_out
    part = tl.arange(0, PARTS)
    total = tl.sum(
        tl.load(sums + part[:, None] * d_out + rows[None, :], (part < parts)[:, None] & valid[None, :], 0.0), 0
    )
    through_factors = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        at = rows[:, None] * rank + ranks[None, :]
        mask = valid[:, None] & (ranks < rank)[None, :]
        through_factors += tl.sum(tl.load(factor_grad + at, mask, 0.0) * tl.load(B + at, mask, 0.0), 1)
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
    n = tl.load(norm + rows, valid, 0.0)
    if TAU_PER_ROW:
        denominator = n + tl.load(tau + rows, valid, 0.0)
    else:
        denominator = n + tl.load(tau)
    positive = denominator > 0
    inverse = tl.where(positive, 1.0 / tl.where(positive, denominator, 1.0), 0.0)
    grad_magnitude_rows = grad_scale * inverse
    tl.store(grad_magnitude + rows, grad_magnitude_rows, valid)
    tl.store(grad_tau + rows, -grad_magnitude_rows * c, valid)
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
            tl.store(grad_gram + at, (per_norm[:, None] * b).to(grad_gram.dtype.element_ty), mask)


@triton.jit
def _hidden_features(
    embedding, w1, rank, embedding_dim, hidden_dim, slope, R: tl.constexpr, E: tl.constexpr, H: tl.constexpr
):
    """``(E W1^T / sqrt(e), act of it / h, E, W1)`` of one factor's network, masked with zeros."""
    ranks, widths, units = tl.arange(0, R), tl.arange(0, E), tl.arange(0, H)
    e = tl.load(
        embedding + ranks[:, None] * embedding_dim + widths[None, :],
        (ranks < rank)[:, None] & (widths < embedding_dim)[None, :],
        0.0,
    )
    w = tl.load(
        w1 + units[:, None] * embedding_dim + widths[None, :],
        (units < hidden_dim)[:, None] & (widths < embedding_dim)[None, :],
        0.0,
    )
    before = tl.dot(e, tl.trans(w), input_precision="ieee") / tl.sqrt_rn(embedding_dim.to(tl.float32))
    return before, tl.where(before > 0, before, slope * before) / hidden_dim, e, w


@triton.jit
def _columns_of_A(
    embedding, w1, w2_A, A, block, d_in, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    features = _hidden_features(embedding, w1, rank, embedding_dim, hidden_dim, slope, R, E, H)[1]
    ranks, units, columns = tl.arange(0, R), tl.arange(0, H), block * BLOCK + tl.arange(0, BLOCK)
    ok = columns < d_in
    w2 = tl.load(
        w2_A + columns[None, :] * hidden_dim + units[:, None], ok[None, :] & (units < hidden_dim)[:, None], 0.0
    )
    a = tl.dot(features, w2, input_precision="ieee")
    tl.store(A + ranks[:, None] * d_in + columns[None, :], a, (ranks < rank)[:, None] & ok[None, :])


@triton.jit
def _rows_of_B(
    embedding, w1, w2_B, B, block, d_out, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    features = _hidden_features(embedding, w1, rank, embedding_dim, hidden_dim, slope, R, E, H)[1]
    ranks, units, rows = tl.arange(0, R), tl.arange(0, H), block * BLOCK + tl.arange(0, BLOCK)
    ok = rows < d_out
    w2 = tl.load(w2_B + rows[:, None] * hidden_dim + units[None, :], ok[:, None] & (units < hidden_dim)[None, :], 0.0)
    b = tl.dot(w2, tl.trans(features), input_precision="ieee")
    tl.store(B + rows[:, None] * rank + ranks[None, :], b, ok[:, None] & (ranks < rank)[None, :])


@triton.jit
def generate_kernel(
    embedding_A, w1_A, w2_A, embedding_B, w1_B, w2_B, A, B,
    d_in, d_out, rank, embedding_dim, hidden_dim, slope, blocks_A,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns of A, or of rows of B, from its network."""
    block = tl.program_id(0)
    if block < blocks_A:
        _columns_of_A(embedding_A, w1_A, w2_A, A, block, d_in, rank, embedding_dim, hidden_dim, slope, R, E, H, BLOCK)
    else:
        _rows_of_B(
            embedding_B, w1_B, w2_B, B, block - blocks_A, d_out, rank, embedding_dim, hidden_dim, slope, R, E, H, BLOCK
        )  # fmt: skip


@triton.jit
def _outer_gradient_A(
    embedding, w1, w2_A, grad_A, grad_w2, part, block, d_in, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    features = _hidden_features(embedding, w1, rank, embedding_dim, hidden_dim, slope, R, E, H)[1]
    ranks, units, columns = tl.arange(0, R), tl.arange(0, H), block * BLOCK + tl.arange(0, BLOCK)
    at = columns[:, None] * hidden_dim + units[None, :]
    mask = (columns < d_in)[:, None] & (units < hidden_dim)[None, :]
    grad_ok = (ranks < rank)[:, None] & (columns < d_in)[None, :]
    g = tl.load(grad_A + ranks[:, None] * d_in + columns[None, :], grad_ok, 0.0)
    tl.store(grad_w2 + at, tl.dot(tl.trans(g), features, input_precision="ieee"), mask)
    tl.store(
        part + ranks[:, None] * H + units[None, :], tl.dot(g, tl.load(w2_A + at, mask, 0.0), input_precision="ieee")
    )


@triton.jit
def _outer_gradient_B(
    embedding, w1, w2_B, grad_B, grad_w2, part, block, d_out, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    features = _hidden_features(embedding, w1, rank, embedding_dim, hidden_dim, slope, R, E, H)[1]
    ranks, units, rows = tl.arange(0, R), tl.arange(0, H), block * BLOCK + tl.arange(0, BLOCK)
    at = rows[:, None] * hidden_dim + units[None, :]
    mask = (rows < d_out)[:, None] & (units < hidden_dim)[None, :]
    grad_ok = (rows < d_out)[:, None] & (ranks < rank)[None, :]
    g = tl.load(grad_B + rows[:, None] * rank + ranks[None, :], grad_ok, 0.0)
    tl.store(grad_w2 + at, tl.dot(g, features, input_precision="ieee"), mask)
    w2 = tl.load(w2_B + at, mask, 0.0)
    tl.store(part + ranks[:, None] * H + units[None, :], tl.dot(tl.trans(g), w2, input_precision="ieee"))


@triton.jit
def generate_outer_gradient_kernel(
    embedding_A, w1_A, w2_A, embedding_B, w1_B, w2_B, grad_A, grad_B, grad_w2_A, grad_w2_B, grad_features,
    d_in, d_out, rank, embedding_dim, hidden_dim, slope, blocks_A,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of W2, and the block's part of the gradient of the features, ``[blocks, R, H]``."""
    block = tl.program_id(0)
    part = grad_features + block * R * H
    if block < blocks_A:
        _outer_gradient_A(
            embedding_A,
            w1_A,
            w2_A,
            grad_A,
            grad_w2_A,
            part,
            block,
            d_in,
            rank,
            embedding_dim,
            hidden_dim,
            slope,
            R,
            E,
            H,
            BLOCK,
        )
    else:
        _outer_gradient_B(
            embedding_B, w1_B, w2_B, grad_B, grad_w2_B, part, block - blocks_A, d_out, rank, embedding_dim, hidden_dim,
            slope, R, E, H, BLOCK,
        )  # fmt: skip


@triton.jit
def _inner_gradient(
    embedding, w1, grad_features, grad_embedding, grad_w1, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    ranks, widths, units = tl.arange(0, R), tl.arange(0, E), tl.arange(0, H)
    before, _, e, w = _hidden_features(embedding, w1, rank, embedding_dim, hidden_dim, slope, R, E, H)
    grad = tl.load(grad_features + ranks[:, None] * H + units[None, :])
    inner = grad * tl.where(before > 0, 1.0, slope) / (hidden_dim * tl.sqrt_rn(embedding_dim.to(tl.float32)))
    inner_ok = (widths < embedding_dim)[None, :]
    tl.store(
        grad_embedding + ranks[:, None] * embedding_dim + widths[None, :],
        tl.dot(inner, w, input_precision="ieee"), (ranks < rank)[:, None] & inner_ok,
    )  # fmt: skip
    tl.store(
        grad_w1 + units[:, None] * embedding_dim + widths[None, :],
        tl.dot(tl.trans(inner), e, input_precision="ieee"), (units < hidden_dim)[:, None] & inner_ok,
    )  # fmt: skip


@triton.jit
def generate_inner_gradient_kernel(
    embedding_A, w1_A, embedding_B, w1_B, grad_features_A, grad_features_B,
    grad_embedding_A, grad_w1_A, grad_embedding_B, grad_w1_B, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Gradients of embedding and W1 from those of the features, ``[R, H]``: program 0 for A's network, 1 for B's."""
    if tl.program_id(0) == 0:
        _inner_gradient(
            embedding_A, w1_A, grad_features_A, grad_embedding_A, grad_w1_A, rank, embedding_dim, hidden_dim, slope,
            R, E, H,
        )  # fmt: skip
    else:
        _inner_gradient(
            embedding_B, w1_B, grad_features_B, grad_embedding_B, grad_w1_B, rank, embedding_dim, hidden_dim, slope,
            R, E, H,
        )  # fmt: skip
