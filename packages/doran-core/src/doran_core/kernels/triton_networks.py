"""Triton kernels: the factor networks of networks.py. Imports Triton, so nothing imports this at start-up.

A network's inner layer is one block, so every program computes the features anew: that is cheaper than a launch.
"""

# Triton reads types from the arguments, and `tl.constexpr` marks what is known at compile time.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, type-arg"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["generate_inner_gradient_kernel", "generate_kernel", "generate_outer_gradient_kernel"]


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
    at = ranks[:, None] * d_in + columns[None, :]
    tl.store(A + at, a.to(A.dtype.element_ty), (ranks < rank)[:, None] & ok[None, :])


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
    embedding, w1, w2_A, grad_A, grad_w2, part, block, d_in, rank, embedding_dim, hidden_dim, slope, parts_A,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    features = _hidden_features(embedding, w1, rank, embedding_dim, hidden_dim, slope, R, E, H)[1]
    ranks, units, columns = tl.arange(0, R), tl.arange(0, H), block * BLOCK + tl.arange(0, BLOCK)
    at = columns[:, None] * hidden_dim + units[None, :]
    mask = (columns < d_in)[:, None] & (units < hidden_dim)[None, :]
    grad_ok = (ranks < rank)[:, None] & (columns < d_in)[None, :]
    g = tl.zeros([R, BLOCK], tl.float32)
    for index in range(parts_A):
        g += tl.load(grad_A + (index * rank + ranks[:, None]) * d_in + columns[None, :], grad_ok, 0.0)
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
    d_in, d_out, rank, embedding_dim, hidden_dim, slope, blocks_A, parts_A,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of W2, and the block's part of the gradient of the features, ``[blocks, R, H]``."""
    block = tl.program_id(0)
    part = grad_features + block * R * H
    if block < blocks_A:
        _outer_gradient_A(
            embedding_A, w1_A, w2_A, grad_A, grad_w2_A, part, block, d_in, rank, embedding_dim, hidden_dim, slope,
            parts_A, R, E, H, BLOCK,
        )  # fmt: skip
    else:
        _outer_gradient_B(
            embedding_B, w1_B, w2_B, grad_B, grad_w2_B, part, block - blocks_A, d_out, rank, embedding_dim, hidden_dim,
            slope, R, E, H, BLOCK,
        )  # fmt: skip


@triton.jit
def _inner_gradient(
    embedding, w1, grad_features, blocks, grad_embedding, grad_w1, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    ranks, widths, units = tl.arange(0, R), tl.arange(0, E), tl.arange(0, H)
    before, _, e, w = _hidden_features(embedding, w1, rank, embedding_dim, hidden_dim, slope, R, E, H)
    at = ranks[:, None] * H + units[None, :]
    grad = tl.zeros([R, H], tl.float32)
    for first in range(0, blocks, AT_ONCE):
        block = first + tl.arange(0, AT_ONCE)[:, None, None]
        grad += tl.sum(tl.load(grad_features + block * (R * H) + at[None, :, :], block < blocks, 0.0), 0)
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
    embedding_A, w1_A, embedding_B, w1_B, grad_features, grad_embedding_A, grad_w1_A, grad_embedding_B, grad_w1_B,
    rank, embedding_dim, hidden_dim, slope, blocks_A, blocks_B,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Gradients of embedding and W1 from those of the features in parts: program 0 for A's network, 1 for B's."""
    if tl.program_id(0) == 0:
        _inner_gradient(
            embedding_A, w1_A, grad_features, blocks_A, grad_embedding_A, grad_w1_A,
            rank, embedding_dim, hidden_dim, slope, R, E, H, AT_ONCE,
        )  # fmt: skip
    else:
        _inner_gradient(
            embedding_B, w1_B, grad_features + blocks_A * R * H, blocks_B, grad_embedding_B, grad_w1_B,
            rank, embedding_dim, hidden_dim, slope, R, E, H, AT_ONCE,
        )  # fmt: skip
