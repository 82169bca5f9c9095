"""One adapted linear layer as an autograd Function: the base product, two thin products, and two passes over memory.

Forward, from A ``[r, d_in]``, B ``[d_out, r]`` (already times g) and c ``[d_out]``; z = W0 x + bias, h = x A^T:

    y = c (W0 x + B A x) + bias = c (z + h B^T) + (1 - c) bias

Backward, from G = dL/dy, summed over tokens:

    dv = c G        dx = dv W0 + (dv B) A        dA = (dv B)^T x        dB = dv^T h        dc = sum G (y - bias) / c

``dc`` needs the output before scaling. It is not kept: y, which the next layer often keeps anyway, stands in for it.
Where some c is near 0, where y was written to in place, and where ``recomputes`` says so, ``W0 x`` is computed again:
``dc = sum G (W0 x) + sum((G^T h) * B, 1)``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core.errors import BackendError
from doran_core.kernels.passes import TorchPasses, accumulating_product
from doran_core.support.torch_internals import apply_directly, version, without_view

__all__ = ["SECOND_DERIVATIVE", "LayerSide", "apply", "small_scale", "without_autocast"]

SECOND_DERIVATIVE = (
    "the hand-written backward of an adapted layer has no derivative of its own (create_graph=True): "
    "use doran_core.kernels.use_backend('reference')"
)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off for the tensor's device; for free where it is off already."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def small_scale(dtype: torch.dtype, *, has_bias: bool) -> float:
    """``|c|`` below which the layer's output no longer stands in for the output before scaling.

    ``(y - bias) / c`` has an error of ``eps |bias| / |c|``; without a bias only underflow counts, and c = 0.
    """
    return 0.5 if has_bias or dtype == torch.float16 else 1e-3


@dataclass(slots=True, eq=False)
class LayerSide:
    """The weight side of one layer: what its weights and parameters make of it, whatever its input.

    Attributes:
        A: ``[r, d_in]`` in the dtype of W0.
        B: ``[d_out, r]``, g included, likewise.
        scale: ``c``, ``[d_out]`` acc.
        passes: the implementation of the passes.
        has_small_scale: tells whether some ``|c|`` is below :func:`small_scale`.
        ports: A ``[r, d_in]``, B ``[d_out, r]`` and c ``[k, d_out]``, acc, through which autograd gets their
            gradients, that of c in k parts. Their values are never read. None without gradients.
        recomputes: keep neither y nor W0 x; and so under hooks on saved tensors, such as checkpointing's.
        checked: what :mod:`~doran_core.kernels.prepare` compares before it uses this again.
    """

    A: Tensor
    B: Tensor
    scale: Tensor
    passes: TorchPasses
    has_small_scale: Callable[[], bool]
    ports: tuple[Tensor, Tensor, Tensor] | None = None
    recomputes: tuple[bool, bool] = (False, False)
    checked: Any = None


def _flat(tensor: Tensor) -> Tensor:
    """``[..., d]`` as ``[T, d]``."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W0 x + bias``, ``[..., d_out]``, as a tensor that is no view: what a Function returns may not be one."""
    if x.dim() == 2 or bias is None:
        return F.linear(x, weight, bias)
    return without_view(F.linear(_flat(x), weight, bias), (*x.shape[:-1], weight.shape[0]))


def _factors(side: LayerSide, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B in the precision of the branch, which under autocast is not W0's."""
    return (side.A, side.B) if side.A.dtype == dtype else (side.A.to(dtype), side.B.to(dtype))


def _forward(
    side: LayerSide,
    x: Tensor | None,
    low: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``y [..., d_out]`` and ``h [T, r]``."""
    rows = _flat(x if low is None else low)  # type: ignore[arg-type]
    A, B = _factors(side, rows.dtype)
    hidden = F.linear(rows, A)
    if base is not None:
        return side.passes.expand(base, hidden, B, side.scale, bias, inplace=False), hidden
    assert x is not None
    assert weight is not None
    return side.passes.expand(_base_product(x, weight, bias), hidden, B, side.scale, bias, inplace=True), hidden


def _write_counter(tensor: Tensor) -> Tensor:
    """An alias, which shares the tensor's counter of writes and goes on sharing it once it has other data: none."""
    alias = tensor.detach()
    alias.data = tensor.new_empty(0)
    return alias


class AdaptedLinear(torch.autograd.Function):
    """:func:`apply` for autograd.

    It keeps the memory of y. Later operations in place are noticed; writes through ``y.data``, which PyTorch does not
    count, are not, and need the backend "reference". So do second derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        side: LayerSide,
        recomputes: bool,
        x: Tensor | None,
        low: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        *ports: Tensor,
    ) -> Tensor:
        y, hidden = _forward(side, x, low, weight, bias, base)
        ctx.side, ctx.counter = side, None
        kept = base
        if base is None and not recomputes:
            ctx.counter, ctx.writes = _write_counter(y), version(y)
            kept = y.data  # past autograd's own check of outputs: an in-place activation may follow, see backward
        ctx.save_for_backward(kept, hidden, x, low, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackendError(SECOND_DERIVATIVE)
        kind = grad.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return AdaptedLinear.backward(ctx, grad)
        kept, hidden, x, low, weight, bias = ctx.saved_tensors
        need_x, need_low, _, _, need_base, *need_ports = ctx.needs_input_grad[2:]
        side: LayerSide = ctx.side
        shape, out_shape = (x if low is None else low).shape, grad.shape
        rows, scale = _flat(x if low is None else low), side.scale
        A, B = _factors(side, rows.dtype)
        grad = _flat(grad).contiguous()
        is_unwritten = ctx.counter is not None and version(ctx.counter) == ctx.writes
        is_output = is_unwritten and not side.has_small_scale()
        if not is_output and x is not None:
            assert weight is not None
            kept, bias = F.linear(_flat(x), weight), None
        scaled, sums = side.passes.scale_gradient(grad, _flat(kept), scale, bias, is_output=is_output)
        grad_hidden = scaled @ B
        grad_A = grad_B = None
        if any(need_ports):
            grad_A = accumulating_product(grad_hidden.T, rows)
            if is_output:
                grad_B = accumulating_product(scaled.T, hidden)
            else:
                grad_B = accumulating_product(grad.T, hidden)
                sums[0] += (grad_B * B).sum(1)
                grad_B *= scale[:, None]
        grad_x = grad_low = None
        if need_x:
            assert weight is not None
            grad_x = scaled @ weight
            if low is None:
                grad_x.addmm_(grad_hidden, A)
            grad_x = grad_x.view(shape)
        if need_low:
            grad_low = (grad_hidden @ A).view(shape)
        grad_base = scaled.view(out_shape) if need_base else None
        return None, None, grad_x, grad_low, None, None, grad_base, grad_A, grad_B, sums


_apply = apply_directly(AdaptedLinear)


def apply(
    side: LayerSide,
    x: Tensor | None,
    low: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    *,
    recomputes: bool = False,
) -> Tensor:
    """The adapted output, ``[..., d_out]``. Call this where no function transform is active.

    Args:
        side: the layer's weight side; with ports where gradients are enabled.
        x: the base layer's input, ``[..., d_in]``; None with ``base``.
        low: the branch's, where that is not x: dropped out, or in the precision of ``base``.
        weight: W0; None with ``base``.
        bias: ``[d_out]`` or None.
        base: the base layer's output, where the layer was called; else it is computed from x and W0.
        recomputes: do not keep the output.
    """
    kind = side.scale.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return apply(side, x, low, weight, bias, base, recomputes=recomputes)
    if not torch.is_grad_enabled():
        return _forward(side, x, low, weight, bias, base)[0]
    assert side.ports is not None
    y: Tensor = _apply(side, recomputes, x, low, weight, bias, base, *side.ports)
    return y
