"""Triton kernels: the weight side of many layers of one shape in one launch. Imports Triton.

The last dimension of a grid is the layer. What belongs to a layer for good (its parameters, W0) is found through a
table of addresses, ``[layers, columns]`` int64; what a step makes lies in tensors ``[layers, ...]``. The bodies are
those of the kernels for one layer.
"""

# Triton reads types from the arguments, and `tl.constexpr` marks what is known at compile time.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, type-arg"

from __future__ import annotations

import triton
import triton.language as tl

from doran_core.kernels.triton_kernels import assemble_whole, row_products, sum_over_parts, through_scale
from doran_core.kernels.triton_networks import (
    inner_gradient,
    network_outputs,
    outer_gradient,
    sum_of_parts,
    transposed_block,
)

__all__ = [
    "COLUMNS",
    "WIDTH",
    "assemble_fleet_kernel",
    "finish_fleet_kernel",
    "generate_fleet_kernel",
    "inner_gradient_fleet_kernel",
    "outer_gradient_fleet_kernel",
    "parameter",
    "weight_product_fleet_kernel",
]

COLUMNS = (
    "embedding_A", "w1_A", "w2_A", "embedding_B", "w1_B", "w2_B", "magnitude", "raw_tau", "squared_norm", "weight",
)  # fmt: skip
"""What the columns of a table hold."""

WIDTH = tl.constexpr(len(COLUMNS))
"""How many they are."""


@triton.jit
def parameter(table, layer, COLUMN: tl.constexpr):
    """A float32 tensor of a layer. Addresses in a table are multiples of 16."""
    return tl.multiple_of(tl.load(table + layer * WIDTH + COLUMN).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def generate_fleet_kernel(
    table, A, B, d_in, d_out, rank, embedding_dim, hidden_dim, slope, blocks_A,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A ``[layers, r, d_in]`` and B ``[layers, d_out, r]`` from the networks."""
    block, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if block < blocks_A:
        network_outputs(
            parameter(table, layer, 0), parameter(table, layer, 1), parameter(table, layer, 2),
            A + layer * rank * d_in, block, d_in, d_in, 1, rank, embedding_dim, hidden_dim, slope, R, E, H, BLOCK,
        )  # fmt: skip
    else:
        network_outputs(
            parameter(table, layer, 3), parameter(table, layer, 4), parameter(table, layer, 5),
            B + layer * d_out * rank, block - blocks_A, d_out, 1, rank, rank, embedding_dim, hidden_dim, slope,
            R, E, H, BLOCK,
        )  # fmt: skip


@triton.jit
def assemble_fleet_kernel(
    table, A, B, tau, aligned, norm, scale, scaled_B, least,
    d_out, rank, d_in, scaling, threshold,
    TAU_PER_ROW: tl.constexpr, REPAIR: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """K, n, c and B' of the layers, and ``least [layers, blocks]``, the least ``|c|`` of a block of rows."""
    layer = tl.program_id(1).to(tl.int64)
    weight = tl.multiple_of(tl.load(table + layer * WIDTH + 9).to(tl.pointer_type(A.dtype.element_ty)), 16)
    c = assemble_whole(
        weight, A + layer * rank * d_in, B + layer * d_out * rank,
        parameter(table, layer, 8), parameter(table, layer, 6), tau + (layer * d_out if TAU_PER_ROW else layer),
        aligned + layer * d_out * rank, norm + layer * d_out, scale + layer * d_out, scaled_B + layer * d_out * rank,
        d_out, rank, d_in, d_in, 1, scaling, threshold,
        TAU_PER_ROW, REPAIR, PRECISION, WIDEN, BLOCK_D, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    valid = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D) < d_out
    smallest = tl.min(tl.where(valid, tl.abs(c), float("inf")), 0)
    tl.store(least + layer * tl.num_programs(0) + tl.program_id(0), smallest)


@triton.jit
def finish_fleet_kernel(
    table, received, B, aligned, norm, scale, tau, grad_B, grad_product, grad_magnitude, grad_tau,
    d_out, rank, parts, rows_per_raw, scaling,
    TAU_PER_ROW: tl.constexpr, DETACH: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradients per row, from what the layers sent.

    ``received [layers, 4]``: the addresses of the branch's gradient of A, of P and of the sums of
    :meth:`Passes.scale_gradient`, and whether these are of the layer's output (else of its base's).
    """
    layer = tl.program_id(1).to(tl.int64)
    factor_grad, sums = _received(received, layer, 1), _received(received, layer, 2)
    B, aligned = B + layer * d_out * rank, aligned + layer * d_out * rank
    rows = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = rows < d_out
    total = sum_over_parts(sums, parts, rows, valid, d_out, PARTS)
    c = tl.load(scale + layer * d_out + rows, valid, 1.0)
    if tl.load(received + layer * 4 + 3) != 0:
        grad_scale = total / c
    else:
        grad_scale = total + scaling * row_products(factor_grad, B, rows, valid, rank, BLOCK_D, BLOCK_R)
    through_scale(
        grad_scale, c, factor_grad, aligned, B, norm + layer * d_out, tau + (layer * d_out if TAU_PER_ROW else layer),
        parameter(table, layer, 7), grad_B + layer * d_out * rank, grad_product + layer * d_out * rank,
        grad_magnitude + layer * d_out, grad_tau + layer * d_out, rows, valid, rank, rows_per_raw, scaling,
        TAU_PER_ROW, True, DETACH, BLOCK_D, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _received(received, layer, COLUMN: tl.constexpr):
    return tl.multiple_of(tl.load(received + layer * 4 + COLUMN).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def weight_product_fleet_kernel(
    table, grad_product, out, d_out, d_in, rank, rows_per_part,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``M^T W0`` in parts, ``[layers, parts, r, d_in]``. One block holds the rank."""
    part, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    ranks, columns = tl.arange(0, BLOCK_R), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    rank_ok, column_ok = ranks < rank, columns < d_in
    weight = tl.multiple_of(tl.load(table + layer * WIDTH + 9).to(tl.pointer_type(grad_product.dtype.element_ty)), 16)
    grad_product += layer * d_out * rank
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    end = tl.minimum((part + 1) * rows_per_part, d_out)
    for first in range(part * rows_per_part, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        row_ok = rows < end
        m = tl.load(grad_product + rows[:, None] * rank + ranks[None, :], row_ok[:, None] & rank_ok[None, :], 0.0)
        w = tl.load(
            weight + rows.to(tl.int64)[:, None] * d_in + columns[None, :], row_ok[:, None] & column_ok[None, :], 0.0
        )
        if WIDEN:
            m, w = m.to(tl.float32), w.to(tl.float32)
        total = tl.dot(tl.trans(m), w, total, input_precision=PRECISION)
    out += (layer * tl.num_programs(1) + part) * rank * d_in
    tl.store(out + ranks[:, None] * d_in + columns[None, :], total, rank_ok[:, None] & column_ok[None, :])


@triton.jit
def outer_gradient_fleet_kernel(
    table, received, through_norm, mixed, A, grad_B, grad_w2_A, grad_w2_B, grad_features,
    d_in, d_out, rank, embedding_dim, hidden_dim, slope, blocks_A, parts, scaling,
    DETACH: tl.constexpr, R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of W2, and the blocks' parts of the gradient of the features, ``[layers, blocks, R, H]``.

    The gradient of A is that of the branch, plus ``M^T W0`` in parts, plus ``g (M^T B) A``.
    """
    block, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part = grad_features + (layer * tl.num_programs(0) + block) * R * H
    if block < blocks_A:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        g = sum_of_parts(_received(received, layer, 0), 1, columns, d_in, rank, R, BLOCK)
        if not DETACH:
            g += sum_of_parts(through_norm + layer * parts * rank * d_in, parts, columns, d_in, rank, R, BLOCK)
            ranks, others = tl.arange(0, R), tl.arange(0, R)
            ok = (ranks < rank)[:, None] & (others < rank)[None, :]
            mixture = tl.load(mixed + layer * rank * rank + ranks[:, None] * rank + others[None, :], ok, 0.0)
            a = sum_of_parts(A + layer * rank * d_in, 1, columns, d_in, rank, R, BLOCK)
            g += scaling * tl.dot(mixture.to(tl.float32), a, input_precision="ieee")
        outer_gradient(
            g, parameter(table, layer, 0), parameter(table, layer, 1), parameter(table, layer, 2),
            grad_w2_A + layer * d_in * hidden_dim, part, columns, d_in, rank, embedding_dim, hidden_dim, slope, R, E, H,
        )  # fmt: skip
    else:
        rows = (block - blocks_A) * BLOCK + tl.arange(0, BLOCK)
        outer_gradient(
            transposed_block(grad_B + layer * d_out * rank, rows, d_out, rank, R),
            parameter(table, layer, 3), parameter(table, layer, 4), parameter(table, layer, 5),
            grad_w2_B + layer * d_out * hidden_dim, part, rows, d_out, rank, embedding_dim, hidden_dim, slope, R, E, H,
        )  # fmt: skip


@triton.jit
def inner_gradient_fleet_kernel(
    trunks, ranges, members, grad_features, grad_embedding, grad_w1,
    most, rank, embedding_dim, hidden_dim, slope,
    R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Gradients of embedding and W1 of each network of each trunk.

    ``trunks [networks, 2]`` has the addresses of embedding and W1; ``ranges [networks + 1]`` where a network's blocks
    start in ``members``, indices into ``grad_features [blocks, R, H]``; ``most`` is the largest number of them.
    """
    network = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, R)[:, None] * H + tl.arange(0, H)[None, :]
    start, end = tl.load(ranges + network), tl.load(ranges + network + 1)
    total = tl.zeros([R, H], tl.float32)
    for first in range(0, most, AT_ONCE):
        index = start + first + tl.arange(0, AT_ONCE)
        inside = (index < end)[:, None, None]
        block = tl.load(members + index, index < end, 0)[:, None, None].to(tl.int64)
        total += tl.sum(tl.load(grad_features + block * (R * H) + at[None, :, :], inside, 0.0), 0)
    embedding = tl.load(trunks + network * 2).to(tl.pointer_type(tl.float32))
    w1 = tl.load(trunks + network * 2 + 1).to(tl.pointer_type(tl.float32))
    inner_gradient(
        total, embedding, w1, grad_embedding + network * rank * embedding_dim,
        grad_w1 + network * hidden_dim * embedding_dim, rank, embedding_dim, hidden_dim, slope, R, E, H,
    )  # fmt: skip
