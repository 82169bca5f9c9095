"""Triton kernels: the weight sides of many layers of one shape whose rank is more than one block. Imports Triton."""

# Triton reads types from the arguments, and `tl.constexpr` marks what is known at compile time.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, type-arg"

from __future__ import annotations

import triton
import triton.language as tl

from doran_core.kernels.triton_fleet import WIDTH, parameter
from doran_core.kernels.triton_kernels import assemble_over_product

__all__ = ["assemble_wide_kernel", "layer_product_kernel"]


@triton.jit
def _operand(tensor, table, layer, stride, COLUMN: tl.constexpr, TABLE_WIDTH: tl.constexpr):
    """A layer's matrix: ``tensor[layer]``, or what a column of a table has the address of, float32."""
    if COLUMN < 0:
        address = tensor + layer * stride
    else:
        address = tl.multiple_of(tl.load(table + layer * TABLE_WIDTH + COLUMN).to(tl.pointer_type(tl.float32)), 16)
    return address


@triton.jit
def layer_product_kernel(
    left, left_table, right, right_table, out, out_table, m, n, k, alpha,
    left_layer, left_row, left_column, right_layer, right_row, right_column, out_layer, out_row, out_column,
    LEFT: tl.constexpr, LEFT_WIDTH: tl.constexpr, RIGHT: tl.constexpr, RIGHT_WIDTH: tl.constexpr,
    OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = alpha left @ right``, or added to it, of each layer; ``[m, k]`` and ``[k, n]`` by their strides.

    PRECISION is bf16, of both operands, or one of Triton's for float32. With tf32 both are best contiguous along k.

    A column, if not negative, is where a table ``[layers, width]`` has the addresses of an operand.
    """
    layer = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(n, BLOCK_N)
    rows = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < m, columns < n
    a_rows = _operand(left, left_table, layer, left_layer, LEFT, LEFT_WIDTH) + rows[:, None] * left_row
    b_columns = _operand(right, right_table, layer, right_layer, RIGHT, RIGHT_WIDTH) + columns[None, :] * right_column
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, k, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        inner_ok = inner < k
        a = tl.load(a_rows + inner[None, :] * left_column, row_ok[:, None] & inner_ok[None, :], 0.0)
        b = tl.load(b_columns + inner[:, None] * right_row, inner_ok[:, None] & column_ok[None, :], 0.0)
        if PRECISION == "bf16":
            total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
        else:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    total *= alpha
    at = _operand(out, out_table, layer, out_layer, OUT, OUT_WIDTH) + rows[:, None] * out_row
    at += columns[None, :] * out_column
    mask = row_ok[:, None] & column_ok[None, :]
    if ADD:
        total += tl.load(at, mask, 0.0)
    tl.store(at, total.to(at.dtype.element_ty), mask)


@triton.jit
def assemble_wide_kernel(
    table, product, gram, A, B, tau, norm, scale, scaled_B, least,
    d_out, rank, d_in, scaling, threshold,
    TAU_PER_ROW: tl.constexpr, REPAIR: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """K over U, n, c and B' of the layers, and ``least [layers, blocks]``; ``gram`` is ``B (A A^T)``."""
    layer = tl.program_id(1).to(tl.int64)
    weight = tl.multiple_of(tl.load(table + layer * WIDTH + 9).to(tl.pointer_type(A.dtype.element_ty)), 16)
    of_rows, factors = layer * d_out, layer * d_out * rank
    c = assemble_over_product(
        product + factors, gram + factors, B + factors, parameter(table, layer, 8), parameter(table, layer, 6),
        tau + (of_rows if TAU_PER_ROW else layer), weight, A + layer * rank * d_in,
        norm + of_rows, scale + of_rows, scaled_B + factors,
        d_out, rank, d_in, d_in, 1, scaling, threshold, TAU_PER_ROW, REPAIR, BLOCK_D, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    valid = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D) < d_out
    smallest = tl.min(tl.where(valid, tl.abs(c), float("inf")), 0)
    tl.store(least + layer * tl.num_programs(0) + tl.program_id(0), smallest)
