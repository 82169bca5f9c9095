"""The passes of an adapted layer that are more than one matrix product, in PyTorch; triton_passes.py has kernels.

Shapes: T tokens, d_out rows of W0, d_in columns, r the rank, N layers of one shape; "acc" is float32, or float64 for a
float64 base. adapted_linear.py and weight_side.py have the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from doran_core import functional
from doran_core.kernels.backend import Implementation

__all__ = ["Shape", "TorchPasses", "accumulating_product", "narrow_on_cuda", "passes_of"]


def narrow_on_cuda(tensor: Tensor) -> bool:
    """Whether the GPU's matrix units accumulate products of this tensor in float32 by themselves."""
    return tensor.is_cuda and tensor.dtype.itemsize < 4


def accumulating_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two matrices, accumulated and returned in acc."""
    if left.dtype.itemsize >= 4:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else functional.wide_product(left, right)


@dataclass
class Shape:
    """What the weight sides of N layers of one shape depend on besides parameters.

    Attributes:
        weights: the W0 ``[d_out, d_in]``; empty if the layers hide them.
        squared_norm: ``||W0||^2``, ``[N, d_out]`` acc.
        least_scales: ``|c|`` of each layer below which y does not tell the output before scaling.
        dtype: of A and B in the layers.
        scaling: ``g``.
        detach_norm: no gradient through the norm.
        repair: take the norm directly for rows in which V nearly cancels.
        passes: the implementation.
    """

    weights: Sequence[Tensor]
    squared_norm: Tensor
    least_scales: Sequence[float]
    dtype: torch.dtype
    scaling: float
    detach_norm: bool
    repair: bool
    passes: TorchPasses


class TorchPasses:
    """On any device."""

    def sum_parts(self, d_out: int) -> int:
        """k: in how many parts :meth:`scale_gradient` returns its sums over tokens."""
        return 1

    def expand(
        self, base_output: Tensor, hidden: Tensor, B: Tensor, scale: Tensor, bias: Tensor | None, *, inplace: bool
    ) -> Tensor:
        """``y = c (z + h B^T) + (1 - c) bias`` for ``z = W0 x + bias [..., d_out]`` and ``h = x A^T [T, r]``."""
        if base_output.dtype != scale.dtype:
            z, h, B = (tensor.to(scale.dtype) for tensor in (base_output.view(hidden.shape[0], -1), hidden, B))
            y = _scaled(torch.addmm(z, h, B.T), scale, bias).view(base_output.shape)
            return base_output.copy_(y) if inplace else y.to(base_output.dtype)
        y = base_output if inplace else base_output.clone()
        _scaled(y.view(hidden.shape[0], -1).addmm_(hidden, B.T), scale, bias)
        return y

    def scale_gradient(
        self, grad: Tensor, kept: Tensor, scale: Tensor, bias: Tensor | None, *, is_output: bool
    ) -> tuple[Tensor, Tensor]:
        """``c G [T, d_out]``, and ``sum over tokens of G (kept - bias)``, over c if kept is y: ``[k, d_out]`` acc."""
        wide = grad.to(scale.dtype)
        work = wide * kept
        total = work.sum(0)
        if bias is not None:
            total -= bias * wide.sum(0)
        if is_output:
            total /= scale
        return torch.mul(wide, scale, out=work).to(grad.dtype), total[None]

    def row_scales(
        self, shape: Shape, U: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, tau: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``K = V A^T [N, d_out, r]``, which the norm's gradient needs, and n and c ``[N, d_out]``, all acc.

        Args:
            shape: of the layers.
            U: ``W0 A^T [N, d_out, r]`` acc where W0 is hidden, else None.
            A: ``[N, r, d_in]`` as the layers use it.
            B: ``[N, d_out, r]`` acc, without the scaling.
            magnitude: ``[N, d_out]``.
            tau: ``[N, 1]`` or ``[N, d_out]``.
        """
        if U is None:
            U = torch.stack([accumulating_product(w, a.T) for w, a in zip(shape.weights, A, strict=True)])
        wide_A = A.to(B.dtype)
        K = torch.baddbmm(U, B, wide_A @ wide_A.mT, alpha=shape.scaling)
        square = shape.squared_norm + shape.scaling * (B * (U + K)).sum(2)
        norm = square.clamp_min(0.0).sqrt_()
        if shape.repair:
            _take_cancelled_rows_directly(shape, wide_A, B, K, norm)
        denominator = norm + tau
        return K, norm, (magnitude / denominator).masked_fill_(denominator <= 0, 0.0)

    def add_weight_products(self, shape: Shape, total: Tensor, left: Tensor) -> None:
        """Add ``M^T W0`` to ``total [N, r, d_in]`` acc, from ``M [N, d_out, r]`` in the W0's dtype."""
        for out, M, weight in zip(total, left, shape.weights, strict=True):
            if narrow_on_cuda(weight):
                torch.addmm(out, M.T, weight, out_dtype=torch.float32, out=out)
            elif weight.dtype == out.dtype:
                out.addmm_(M.T, weight)
            else:
                out.add_(functional.wide_transposed_product(M, weight))

    def expert_rows(self, base_output: Tensor, delta: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
        """``y = c z + delta [T, d_out]`` in the dtype of z, with the c of each row's expert.

        Args:
            base_output: z ``[T, d_out]``, the rows of each expert together.
            delta: ``[T, d_out]``.
            scale: c ``[experts, d_out]`` acc.
            ends: ``[experts]``, where each expert's rows end; rows after the last end are the last expert's.
        """
        rows = scale[_experts_of_rows(base_output, ends)]
        return torch.addcmul(delta.to(scale.dtype), base_output.to(scale.dtype), rows).to(base_output.dtype)

    def expert_rows_gradient(
        self, grad: Tensor, base_output: Tensor, scale: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``c G`` in the dtype of z, and the sum of ``G z`` over the rows of each expert, ``[experts, d_out]`` acc."""
        experts, wide = _experts_of_rows(base_output, ends), grad.to(scale.dtype)
        sums = torch.zeros_like(scale).index_add_(0, experts, wide * base_output)
        return (wide * scale[experts]).to(base_output.dtype), sums


def _experts_of_rows(rows: Tensor, ends: Tensor) -> Tensor:
    """The number of each row's expert, ``[T]``."""
    places = torch.arange(len(rows), device=ends.device)
    return torch.searchsorted(ends.to(places.dtype), places, right=True).clamp_max(len(ends) - 1)


def _take_cancelled_rows_directly(shape: Shape, A: Tensor, B: Tensor, K: Tensor, norm: Tensor) -> None:
    """Take K and n anew, from V, for rows in which V nearly cancels."""
    if norm.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a graph's replays cannot ask
    lost = norm.square() < functional.CANCELLATION_THRESHOLD**2 * shape.squared_norm
    if not bool(lost.any()):
        return
    for layer in lost.any(1).nonzero()[:, 0].tolist():
        rows = lost[layer].nonzero()[:, 0]
        V = functional.direction(shape.weights[layer][rows], A[layer], B[layer, rows], shape.scaling)
        norm[layer, rows] = torch.linalg.vector_norm(V, dim=1)
        K[layer, rows] = V @ A[layer].T


def _scaled(v: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``c v + (1 - c) bias`` in place."""
    v.mul_(scale)
    return v if bias is None else v.add_((1.0 - scale) * bias)


@functools.cache
def passes_of(implementation: Implementation) -> TorchPasses:
    """The passes of an implementation. Triton is imported here and not before."""
    if implementation == "triton":
        from doran_core.kernels.triton_passes import TritonPasses

        return TritonPasses()
    return TorchPasses()
