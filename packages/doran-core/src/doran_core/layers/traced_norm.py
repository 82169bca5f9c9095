"""The factored norm of several layers in one autograd Function that Dynamo traces through; see traced.py.

    U = W0 A^T      K = U + B (A A^T) = V A^T      n^2 = ||W0||^2 + sum(B * (U + K), 1)

Backward, from dn: M = dL/dU = (dn / n) B      dB = (dn / n) K      dA = M^T (W0 + B A)

The caller has scaled B by g. A Python float that differs between layers becomes a symbol to Dynamo, and Dynamo of torch
2.13 loses that symbol between the Function and the operations around it.

Each W0 is read twice, in its stored precision: a GPU makes no float32 copy of W0, and no device keeps one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from doran_core import functional

__all__ = ["accumulated_product", "cast", "row_norms"]


def row_norms(A: Tensor, B: Tensor, squared_norm: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``||W0 + B A||`` per row of all layers, concatenated.

    Args:
        A: the layers' ``A^T [d_in, r]``, concatenated, in float32 or wider; products round them to W0's dtype.
        B: the layers' ``g B``, ``[d_out, r]``, likewise.
        squared_norm: ``||W0||^2``, ``[sum of d_out]``.
        weights: the W0 ``[d_out, d_in]``, frozen, of one dtype.

    Returns:
        ``[sum of d_out]``.
    """
    # Without gradients, Dynamo counts the arguments to find out whether the Function's forward takes a context, and a
    # varying number of arguments misleads it.
    if not (torch.is_grad_enabled() and (A.requires_grad or B.requires_grad)):
        return _norms(cast(A, weights[0].dtype), B, squared_norm, weights)[0]
    norm: Tensor = _RowNorms.apply(A, B, squared_norm, *weights)  # type: ignore[no-untyped-call]
    return norm


def _norms(low_A: Tensor, B: Tensor, squared_norm: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """n and K."""
    parts = torch.split(low_A, [weight.shape[1] for weight in weights])
    product = torch.cat([accumulated_product(w, a) for w, a in zip(weights, parts, strict=True)])
    gram = torch.cat([accumulated_product(a.mT, a) for a in _stacks(low_A, weights, 1)])
    aligned = product + _times(B, gram, weights, 0)
    return functional.aligned_row_norm(squared_norm, product, aligned, B, 1.0), aligned


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, without an operation if it has that dtype.

    torch 2.11 loses the gradient of a traced Function whose result is an alias of a tensor made in it, such as the
    result of ``to`` or of an in-place operation.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def accumulated_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of one dtype, also of stacked matrices, in float32 or wider."""
    if left.dtype.itemsize >= 4:
        return left @ right
    if left.is_cuda:  # the matrix units accumulate in float32 and can return it
        product = torch.mm if left.dim() == 2 else torch.bmm
        return product(left, right, out_dtype=torch.float32)
    return functional.wide_product(left, right) if left.dim() == 2 else left.float() @ right.float()


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, squared_norm: Tensor, *weights: Tensor) -> Tensor:
        low_A = cast(A, weights[0].dtype)
        norm, aligned = _norms(low_A, B, squared_norm, weights)
        # The layers save parts of B. Inductor's backward overwrites a saved tensor after its last use, even if other
        # saved tensors share its memory (torch 2.13). So B is saved in memory of its own. Inductor would drop a plain
        # copy; it keeps a concatenation, and overwrites neither part.
        ctx.save_for_backward(low_A, torch.cat([B, aligned], 1), norm, *weights)
        return norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        low_A, B_and_aligned, norm, *weights = ctx.saved_tensors
        B, aligned = torch.split(B_and_aligned, low_A.shape[1], 1)
        through_norm = torch.where(norm > 0, grads[0] / norm, 0.0)[:, None]
        grad_product = cast(through_norm * B, low_A.dtype)
        parts = torch.split(grad_product, [weight.shape[0] for weight in weights])
        grad_A = torch.cat([_transposed_product(w, m) for w, m in zip(weights, parts, strict=True)])
        pairs = zip(_stacks(cast(B, low_A.dtype), weights, 0), _stacks(grad_product, weights, 0), strict=True)
        mixed = torch.cat([accumulated_product(b.mT, m) for b, m in pairs])  # symmetric
        grad_A = grad_A + _times(low_A, mixed, weights, 1)
        return grad_A, through_norm * aligned, None, *(None for _ in weights)


def _transposed_product(weight: Tensor, right: Tensor) -> Tensor:
    """``W0^T right`` in float32 or wider. On a CPU, widening W0 here would keep the forward's wide copy alive."""
    if weight.is_cuda or weight.dtype.itemsize >= 4:
        return accumulated_product(weight.T, right)
    return (weight.T @ right).to(functional.accumulation_dtype(right))


def _stacks(rows: Tensor, weights: Sequence[Tensor], dim: int) -> list[Tensor]:
    """The rows split into layers by the sizes of W0 in ``dim``; k neighbours of one size as one ``[k, size, r]``."""
    runs: list[list[int]] = []
    for weight in weights:
        if runs and runs[-1][1] == weight.shape[dim]:
            runs[-1][0] += 1
        else:
            runs.append([1, weight.shape[dim]])
    parts = torch.split(rows, [count * size for count, size in runs])
    return [part.view(count, size, -1) for part, (count, size) in zip(parts, runs, strict=True)]


def _times(rows: Tensor, matrices: Tensor, weights: Sequence[Tensor], dim: int) -> Tensor:
    """Each layer's rows ``[size, r]`` times its matrix ``[r, r]``, concatenated, in float32 or wider.

    If W0 has half precision, so do the products' inputs. A matrix is then split into the sum of two, which together
    keep 16 of float32's 24 bits.
    """
    dtype = weights[0].dtype
    if dtype.itemsize < 4:
        high = matrices.to(dtype)
        matrices = torch.cat([high, (matrices - high).to(dtype)], 1)
        rows = rows.to(dtype)
        rows = torch.cat([rows, rows], 1)
    stacks = _stacks(rows, weights, dim)
    own = torch.split(matrices, [stack.shape[0] for stack in stacks])
    products = [accumulated_product(stack, m) for stack, m in zip(stacks, own, strict=True)]
    return torch.cat([product.reshape(-1, matrices.shape[-1]) for product in products])
