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
def network_outputs(
    embedding, w1, w2, out, block, size, stride_rank, stride_column, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of ``F W2^T``: columns of A, or rows of B, which is stored the other way round."""
    features = _hidden_features(embedding, w1, rank, embedding_dim, hidden_dim, slope, R, E, H)[1]
    ranks, units, columns = tl.arange(0, R), tl.arange(0, H), block * BLOCK + tl.arange(0, BLOCK)
    ok = columns < size
    w2_block = tl.load(
        w2 + columns[None, :] * hidden_dim + units[:, None], ok[None, :] & (units < hidden_dim)[:, None], 0.0
    )
    value = tl.dot(features, w2_block, input_precision="ieee")
    at = ranks[:, None] * stride_rank + columns[None, :] * stride_column
    tl.store(out + at, value.to(out.dtype.element_ty), (ranks < rank)[:, None] & ok[None, :])


@triton.jit
def generate_kernel(
    embedding_A, w1_A, w2_A, embedding_B, w1_B, w2_B, A, B,
    d_in, d_out, rank, embedding_dim, hidden_dim, slope, blocks_A,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns of A, or of rows of B, from its network."""
    block = tl.program_id(0)
    if block < blocks_A:
        network_outputs(
            embedding_A, w1_A, w2_A, A, block, d_in, d_in, 1, rank, embedding_dim, hidden_dim, slope, R, E, H, BLOCK
        )
    else:
        network_outputs(
            embedding_B, w1_B, w2_B, B, block - blocks_A, d_out, 1, rank, rank, embedding_dim, hidden_dim, slope,
            R, E, H, BLOCK,
        )  # fmt: skip


@triton.jit
def outer_gradient(
    g, embedding, w1, w2, grad_w2, part, columns, size, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """From a block ``g [R, columns]`` of the gradient of ``F W2^T``: that of W2, and its part of that of F."""
    features = _hidden_features(embedding, w1, rank, embedding_dim, hidden_dim, slope, R, E, H)[1]
    ranks, units = tl.arange(0, R), tl.arange(0, H)
    at = columns[:, None] * hidden_dim + units[None, :]
    mask = (columns < size)[:, None] & (units < hidden_dim)[None, :]
    tl.store(grad_w2 + at, tl.dot(tl.trans(g), features, input_precision="ieee"), mask)
    tl.store(part + ranks[:, None] * H + units[None, :], tl.dot(g, tl.load(w2 + at, mask, 0.0), input_precision="ieee"))


@triton.jit
def sum_of_parts(start, parts, columns, size, rank, R: tl.constexpr, BLOCK: tl.constexpr):
    """``[R, columns]`` of the sum of parts ``[parts, rank, size]``."""
    ranks = tl.arange(0, R)
    ok = (ranks < rank)[:, None] & (columns < size)[None, :]
    total = tl.zeros([R, BLOCK], tl.float32)
    for index in range(parts):
        total += tl.load(start + (index * rank + ranks[:, None]) * size + columns[None, :], ok, 0.0)
    return total


@triton.jit
def transposed_block(start, columns, size, rank, R: tl.constexpr):
    """``[R, columns]`` of what is stored as ``[size, rank]``."""
    ranks = tl.arange(0, R)
    ok = (ranks < rank)[:, None] & (columns < size)[None, :]
    return tl.load(start + columns[None, :] * rank + ranks[:, None], ok, 0.0)


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
        columns = block * BLOCK + tl.arange(0, BLOCK)
        outer_gradient(
            sum_of_parts(grad_A, parts_A, columns, d_in, rank, R, BLOCK), embedding_A, w1_A, w2_A, grad_w2_A, part,
            columns, d_in, rank, embedding_dim, hidden_dim, slope, R, E, H,
        )  # fmt: skip
    else:
        rows = (block - blocks_A) * BLOCK + tl.arange(0, BLOCK)
        outer_gradient(
            transposed_block(grad_B, rows, d_out, rank, R), embedding_B, w1_B, w2_B, grad_w2_B, part,
            rows, d_out, rank, embedding_dim, hidden_dim, slope, R, E, H,
        )  # fmt: skip


@triton.jit
def inner_gradient(
    grad, embedding, w1, grad_embedding, grad_w1, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Gradients of embedding and W1 from that of the features, ``[R, H]``."""
    ranks, widths, units = tl.arange(0, R), tl.arange(0, E), tl.arange(0, H)
    before, _, e, w = _hidden_features(embedding, w1, rank, embedding_dim, hidden_dim, slope, R, E, H)
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
def sum_of_blocks(grad_features, blocks, R: tl.constexpr, H: tl.constexpr, AT_ONCE: tl.constexpr):
    """``[R, H]``, the sum of ``[blocks, R, H]``."""
    at = tl.arange(0, R)[:, None] * H + tl.arange(0, H)[None, :]
    total = tl.zeros([R, H], tl.float32)
    for first in range(0, blocks, AT_ONCE):
        block = first + tl.arange(0, AT_ONCE)[:, None, None]
        total += tl.sum(tl.load(grad_features + block * (R * H) + at[None, :, :], block < blocks, 0.0), 0)
    return total


@triton.jit
def generate_inner_gradient_kernel(
    embedding_A, w1_A, embedding_B, w1_B, grad_features, grad_embedding_A, grad_w1_A, grad_embedding_B, grad_w1_B,
    rank, embedding_dim, hidden_dim, slope, blocks_A, blocks_B,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Gradients of embedding and W1 from those of the features in parts: program 0 for A's network, 1 for B's."""
    if tl.program_id(0) == 0:
        inner_gradient(
            sum_of_blocks(grad_features, blocks_A, R, H, AT_ONCE), embedding_A, w1_A, grad_embedding_A, grad_w1_A,
            rank, embedding_dim, hidden_dim, slope, R, E, H,
        )  # fmt: skip
    else:
        inner_gradient(
            sum_of_blocks(grad_features + blocks_A * R * H, blocks_B, R, H, AT_ONCE),
            embedding_B, w1_B, grad_embedding_B, grad_w1_B, rank, embedding_dim, hidden_dim, slope, R, E, H,
        )  # fmt: skip
