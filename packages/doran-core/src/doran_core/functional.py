"""The formulas of DoRAN as pure functions on tensors. Each formula stands here and nowhere else.

Symbols (arXiv 2510.04331; DoRA is arXiv 2402.09353), in PyTorch's layout:

    V  = W0 + g * B @ A        W0 [d_out, d_in] frozen, A [r, d_in], B [d_out, r], g the scaling
    n  = ||V|| per output row  [d_out]
    c  = m / (n + tau)         m [d_out] the magnitude, tau >= 0: [1] or [d_out]
    W' = c[:, None] * V
    y  = c * (W0 x + g B A x) + bias

Imports torch and ``support/accumulation.py`` only. Sums over a row are accumulated in float32, or in float64 if an
operand is float64; never in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core.support.accumulation import (
    accumulation_dtype,
    squared_row_norms,
    wide_product,
    wide_transposed_product,
)

__all__ = [
    "CANCELLATION_THRESHOLD",
    "accumulation_dtype",
    "adapted_linear",
    "adapted_output",
    "aligned_product",
    "aligned_row_norm",
    "base_product",
    "base_squared_norm",
    "cancelled_rows",
    "direction",
    "factored_row_norm",
    "merged_weight",
    "output_scale",
    "per_row",
    "row_norm",
    "scaled_factor",
    "start_norm",
    "wide_product",
    "wide_transposed_product",
]

CANCELLATION_THRESHOLD = 1e-2
"""Below this ratio of ``||V||`` to ``||W0||``, use the direct norm: the factored norm's relative error grows as eps /
ratio^2, the direct norm's as eps / ratio."""


def _safe_sqrt(square: Tensor) -> Tensor:
    """sqrt with value and gradient 0 where ``square`` is not positive (a plain sqrt's gradient is inf or NaN)."""
    if not torch.is_grad_enabled():
        return square.clamp_min(0.0).sqrt()  # in place, torch 2.11 loses a compiled gradient
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def base_squared_norm(weight: Tensor) -> Tensor:
    """``||W0||^2`` per output row.

    Args:
        weight: ``[d_out, d_in]``, any floating dtype.

    Returns:
        ``[d_out]`` in float32, or float64 for a float64 weight.
    """
    return squared_row_norms(weight)


def start_norm(squared_norm: Tensor) -> Tensor:
    """``||W0 + g B A||`` per row for B = 0: equals :func:`factored_row_norm` to the last bit.

    Args:
        squared_norm: ``||W0||^2``, ``[d_out]``.
    """
    return _safe_sqrt(squared_norm)


class _FrozenProduct(torch.autograd.Function):
    """``W0 @ A.T`` in a wider dtype than W0's, with gradients for A alone and no wide copy of W0 kept."""

    @staticmethod
    def forward(weight: Tensor, A: Tensor) -> Tensor:
        return wide_product(weight, A.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, Tensor]:
        (weight,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return None, wide_transposed_product(grad, weight)


def base_product(weight: Tensor, A: Tensor) -> Tensor:
    """``U = W0 @ A.T``, the only product with W0 that the factored norm needs.

    Args:
        weight: ``[d_out, d_in]``, frozen: it gets no gradient when its dtype is narrower than the result's.
        A: ``[r, d_in]``.

    Returns:
        ``[d_out, r]`` in float32, or float64 if either operand is float64.
    """
    dtype = accumulation_dtype(weight, A)
    if weight.dtype == dtype:
        return weight @ A.to(dtype).T
    product: Tensor = _FrozenProduct.apply(weight, A.to(dtype))  # type: ignore[no-untyped-call]
    return product


def aligned_product(product: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``K = V @ A.T = U + g B (A A^T)``: each row's direction along the rows of A, without forming V.

    Args:
        product: ``U``, ``[d_out, r]``, from :func:`base_product`; all of them may have a first dimension of experts.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scaling: ``g``.

    Returns:
        ``[d_out, r]``.
    """
    add_product = torch.addmm if product.dim() == 2 else torch.baddbmm
    return add_product(product, B, A @ A.mT, alpha=scaling)


def aligned_row_norm(squared_norm: Tensor, product: Tensor, aligned: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``||W0 + g B A||`` per row from U and K, the products of W0 and V with A.

    ``n^2 = ||W0||^2 + g sum(B * (U + K), 1)``, which is
    ``||W0||^2 + 2 g sum(B * U, 1) + g^2 sum((B @ (A @ A.T)) * B, 1)``.

    Args:
        squared_norm: ``[d_out]``, from :func:`base_squared_norm`.
        product: ``U``, ``[d_out, r]``, from :func:`base_product`.
        aligned: ``K``, ``[d_out, r]``, from :func:`aligned_product`.
        B: ``[d_out, r]``.
        scaling: ``g``.

    Returns:
        ``[d_out]``.
    """
    return _safe_sqrt(squared_norm + scaling * (B * (product + aligned)).sum(-1))


def factored_row_norm(squared_norm: Tensor, product: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``||W0 + g B A||`` per row without forming ``B A``; :func:`aligned_row_norm` has the formula.

    Args:
        squared_norm: ``[d_out]``, from :func:`base_squared_norm`.
        product: ``U``, ``[d_out, r]``, from :func:`base_product`.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scaling: ``g``.

    Returns:
        ``[d_out]``. Where V nearly cancels, see :func:`cancelled_rows`, its error is large: use :func:`row_norm` there.
    """
    dtype = accumulation_dtype(squared_norm, product, A, B)
    A, B, product = A.to(dtype), B.to(dtype), product.to(dtype)
    return aligned_row_norm(squared_norm, product, aligned_product(product, A, B, scaling), B, scaling)


def cancelled_rows(norm: Tensor, squared_norm: Tensor) -> Tensor:
    """Indices of the rows whose factored norm has lost digits: ``n < CANCELLATION_THRESHOLD * ||W0||``.

    Args:
        norm: ``[d_out]``, from :func:`factored_row_norm`.
        squared_norm: ``||W0||^2``, ``[d_out]``.
    """
    lost = norm.detach().square() < CANCELLATION_THRESHOLD**2 * squared_norm
    # `any` is cheaper than an empty list of indices, and rows hardly ever cancel.
    return lost.nonzero()[:, 0] if bool(lost.any()) else lost.new_empty(0, dtype=torch.int64)


def direction(weight: Tensor, A: Tensor, B: Tensor, scaling: float, *, out: Tensor | None = None) -> Tensor:
    """``V = W0 + g B A``, formed in full.

    Args:
        weight: ``[d_out, d_in]``.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scaling: ``g``.
        out: memory for the result, which then has its dtype; not for autograd.

    Returns:
        ``[d_out, d_in]`` in float32, or float64 if any operand is float64.
    """
    dtype = accumulation_dtype(weight, A, B) if out is None else out.dtype
    A, B = A.to(dtype), B.to(dtype)
    if out is None:
        return torch.addmm(weight.to(dtype), B, A, alpha=scaling)
    return out.copy_(weight).addmm_(B, A, alpha=scaling)


def row_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float, *, out: Tensor | None = None) -> Tensor:
    """``||W0 + g B A||`` per row, directly: forms V, so for merging, tests and rows that cancel.

    Args:
        weight: ``[d_out, d_in]``.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scaling: ``g``.
        out: memory for V, which then has its dtype; not for autograd.

    Returns:
        ``[d_out]`` in float32, or float64 if any operand is float64.
    """
    V = direction(weight, A, B, scaling, out=out)
    return _safe_sqrt(V.square().sum(1)) if out is None else torch.linalg.vector_norm(V, dim=1)


def output_scale(magnitude: Tensor, norm: Tensor, tau: Tensor | float) -> Tensor:
    """``c = m / (n + tau)``.

    Args:
        magnitude: ``m``, ``[d_out]``.
        norm: ``n``, ``[d_out]``; pass ``norm.detach()`` for DoRA's detached gradient (2402.09353, section 4.3).
        tau: a number, ``[1]`` or ``[d_out]``, not negative.

    Returns:
        ``[d_out]``; 0 where ``n + tau`` is 0, that is for a row of zeros without tau.
    """
    denominator = norm + tau
    if not torch.is_grad_enabled():
        return (magnitude / denominator).masked_fill_(denominator <= 0, 0.0)
    positive = denominator > 0
    return torch.where(positive, magnitude / torch.where(positive, denominator, 1.0), 0.0)


def per_row(groups: Tensor, rows: int) -> Tensor:
    """Expand tau per group of neighbouring rows (a head) to tau per row. A single tau, or one per row, is returned as
    it is.

    Args:
        groups: ``[..., k]``, k a divisor of ``rows``.
        rows: d_out.

    Returns:
        ``[..., 1]`` or ``[..., rows]``.
    """
    size = groups.shape[-1]
    return groups if size in (1, rows) else groups.repeat_interleave(rows // size, -1)


def scaled_factor(B: Tensor, scale: Tensor, scaling: float) -> Tensor:
    """``B' = c[:, None] * g * B``: with it, ``y = c * (W0 x) + B' A x + bias``.

    Args:
        B: ``[d_out, r]``.
        scale: ``c``, ``[d_out]``.
        scaling: ``g``.

    Returns:
        ``[d_out, r]``.
    """
    return (scale * scaling)[..., None] * B


def adapted_output(
    base_output: Tensor, delta: Tensor, scale: Tensor, bias: Tensor | None = None, *, channel_dim: int = -1
) -> Tensor:
    """``y = c * (z - bias) + bias + delta``, from the base layer's own output.

    Written as ``c * z + (1 - c) * bias + delta``, which returns ``z`` to the last bit at ``c = 1, delta = 0``
    in every dtype. The arithmetic is float32 or wider; the result has the dtype of ``base_output``.

    Args:
        base_output: ``z = W0 x + bias``, ``[..., d_out]``, or with ``d_out`` at ``channel_dim``.
        delta: ``B' A x`` with B' from :func:`scaled_factor`, shaped as ``base_output``.
        scale: ``c``, ``[d_out]``.
        bias: ``[d_out]`` or None; the bias is never scaled.
        channel_dim: the dimension of ``d_out``.

    Returns:
        Shape and dtype of ``base_output``.
    """
    shape = [1] * base_output.dim()
    shape[channel_dim] = -1
    dtype = accumulation_dtype(base_output)
    scale = scale.to(dtype)
    if bias is not None:
        delta = delta + ((1.0 - scale) * bias).view(shape)
    result = torch.addcmul(delta.to(dtype), base_output.to(dtype), scale.view(shape))
    return result.to(base_output.dtype)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    magnitude: Tensor,
    tau: Tensor | float,
    bias: Tensor | None = None,
    *,
    detach_norm: bool = False,
) -> Tensor:
    """A whole DoRAN linear layer in one call, with the factored norm.

    Args:
        x: ``[..., d_in]``.
        weight: ``[d_out, d_in]``, frozen.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scaling: ``g``.
        magnitude: ``m``, ``[d_out]``.
        tau: a number, ``[1]`` or ``[d_out]``.
        bias: ``[d_out]`` or None.
        detach_norm: no gradient through the norm, as DoRA's paper.

    Returns:
        ``[..., d_out]`` in the dtype of ``x``.
    """
    norm = factored_row_norm(base_squared_norm(weight), base_product(weight, A), A, B, scaling)
    scale = output_scale(magnitude, norm.detach() if detach_norm else norm, tau)
    delta = F.linear(F.linear(x, A.to(x.dtype)), scaled_factor(B, scale, scaling).to(x.dtype))
    return adapted_output(F.linear(x, weight, bias), delta, scale, bias)


def merged_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    magnitude: Tensor,
    tau: Tensor | float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``W' = m / (||V|| + tau) * V`` in float64, with the direct norm; not for autograd.

    Rows are independent: a caller short of memory passes slices of rows of weight, B, magnitude and tau.

    Args:
        weight: ``[d_out, d_in]``.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scaling: ``g``.
        magnitude: ``m``, ``[d_out]``.
        tau: a number, ``[1]`` or ``[d_out]``.
        out: float64 memory for the result, so that a caller with many slices allocates once.

    Returns:
        ``[d_out, d_in]`` in float64; the caller rounds once.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.float64, device=weight.device)
    V = direction(weight, A, B, scaling, out=out)
    norm = torch.linalg.vector_norm(V, dim=1)
    scale = output_scale(magnitude.double(), norm, tau.double() if isinstance(tau, Tensor) else tau)
    return V.mul_(scale[:, None])
