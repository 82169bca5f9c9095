"""An adapted layer as torch.compile and torch.export see it: plain PyTorch operations, for Inductor to fuse.

    v = W0 x + bias + g B (A x)        y = c v + (1 - c) bias
    U = W0 A^T      K = U + g B (A A^T) = V A^T      n^2 = ||W0||^2 + g sum(B * (U + K), 1)      c = m / (n + tau)

The products with x are those of a plain low-rank adapter; c is applied by the code that Inductor makes for what follows
the layer. The backward needs v, which is without c, so a c near 0 is no special case. Two autograd Functions, which
Dynamo traces through, spare what autograd would compute or keep by itself. Nothing branches on values: a changed W0 is
not noticed, and rows in which V nearly cancels keep the factored norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core import functional

if TYPE_CHECKING:
    from doran_core.layers.adapter import DoranAdapter  # which imports this module
    from doran_core.layers.base import BaseView

__all__ = ["forward"]


def forward(adapter: DoranAdapter, view: BaseView, x: Tensor, base_output: Tensor | None = None) -> Tensor:
    """:meth:`DoranAdapter.forward`, traced.

    Args:
        adapter: of the layer.
        view: of its base layer.
        x: the base layer's input.
        base_output: what the base layer made of x, bias included; None leaves that call to this function.

    Returns:
        Shape and dtype of the base layer's output.
    """
    if base_output is None:
        base_output = view.layer(x)
    dtype, bias = base_output.dtype, view.bias
    with torch.autocast(base_output.device.type, enabled=False):
        A, B = adapter.factor_pair()
        scale = adapter.output_scale(_norm(adapter, view, A, B))
        low_A, low_B = A.to(dtype), (adapter.scaling * B).to(dtype)
    if x.is_floating_point():
        x = F.dropout(x.to(dtype), adapter.config.dropout, adapter.training)
    unscaled = base_output + view.low_rank(x, low_A, low_B)
    if bias is not None and bias.requires_grad:
        nothing = torch.zeros((), dtype=dtype, device=unscaled.device)
        return functional.adapted_output(unscaled, nothing, scale, bias, channel_dim=view.channel_dim)
    output: Tensor = _ScaledOutput.apply(unscaled, scale, bias, view.channel_dim)  # type: ignore[no-untyped-call]
    return output


def _norm(adapter: DoranAdapter, view: BaseView, A: Tensor, B: Tensor) -> Tensor:
    """``n``; by the Function where W0 is frozen and at hand, and its norm is to be the factored one."""
    weight = view.weight()
    if weight is None or weight.requires_grad or adapter.config.norm_method == "direct":
        return adapter.norm(view, A, B)
    if adapter.config.norm_grad == "detached":
        A, B = A.detach(), B.detach()
    squared_norm = adapter.squared_norm_of_base(view)
    norm: Tensor = _RowNorm.apply(A, B, weight, squared_norm, adapter.scaling)  # type: ignore[no-untyped-call]
    return norm


class _RowNorm(torch.autograd.Function):
    """``||W0 + g B A||`` per row, ``[d_out]`` acc, from W0 and from A ``[r, d_in]`` and B ``[d_out, r]``, both acc.

    Half precision uses A rounded to W0's dtype, as the layer does. The backward needs K and one product with W0.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, weight: Tensor, squared_norm: Tensor, scaling: float) -> Tensor:
        A = A.to(weight.dtype)
        product = _wide_product(weight, A.T)
        aligned = functional.aligned_product(product, A.to(B.dtype), B, scaling)
        norm = functional.aligned_row_norm(squared_norm, product, aligned, B, scaling)
        ctx.save_for_backward(A, B, weight, aligned, norm)
        ctx.scaling = scaling
        return norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        A, B, weight, aligned, norm = ctx.saved_tensors
        through_norm = torch.where(norm > 0, ctx.scaling * grads[0] / norm, 0.0)[:, None]
        grad_product = through_norm * B
        narrow = grad_product.T.to(weight.dtype)
        # On a CPU, W0 widened here as in the forward would be kept from there: a wide copy for each layer.
        grad_A = _wide_product(narrow, weight) if weight.is_cuda else (narrow @ weight).to(B.dtype)
        grad_A = torch.addmm(grad_A, B.T @ grad_product, A.to(B.dtype), alpha=ctx.scaling)
        return grad_A, through_norm * aligned, None, None, None


class _ScaledOutput(torch.autograd.Function):
    """``c v + (1 - c) bias`` in the dtype of v, for a frozen bias; the arithmetic is float32 or wider."""

    @staticmethod
    def forward(ctx: Any, unscaled: Tensor, scale: Tensor, bias: Tensor | None, channel_dim: int) -> Tensor:
        ctx.save_for_backward(unscaled, scale, bias)
        ctx.channel_dim = channel_dim
        scale, bias = _along(channel_dim, unscaled, scale), _along(channel_dim, unscaled, bias)
        y = unscaled * scale if bias is None else unscaled * scale + (1.0 - scale) * bias
        return y.to(unscaled.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unscaled, scale, bias = ctx.saved_tensors
        (grad,), channel = grads, ctx.channel_dim
        wide = grad.to(scale.dtype)
        bias = _along(channel, unscaled, bias)
        products = wide * (unscaled if bias is None else unscaled - bias.to(scale.dtype))
        others = [dim for dim in range(grad.dim()) if dim != channel % grad.dim()]
        grad_scale = products.sum(others) if others else products
        return (wide * _along(channel, unscaled, scale)).to(grad.dtype), grad_scale, None, None


def _along(channel_dim: int, like: Tensor, rows: Tensor | None) -> Any:
    """``[d_out]`` shaped to go with ``like``, whose dimension ``channel_dim`` is d_out."""
    if rows is None:
        return None
    shape = [1] * like.dim()
    shape[channel_dim] = -1
    return rows.view(shape)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of one dtype, in acc."""
    if left.is_cuda and left.dtype.itemsize < 4:  # the matrix units accumulate in float32 and can return it
        return torch.mm(left, right, out_dtype=torch.float32)
    return functional.wide_product(left, right)
