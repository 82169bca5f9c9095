"""The weight side of N layers of one shape: from their parameters to A, B and c of each, and back.

    A, B from the factors' parameters (ordinary autograd on stacked tensors)
    U = W0 A^T      K = U + g B (A A^T) = V A^T      n^2 = ||W0||^2 + g sum(B * (U + K), 1)      c = m / (n + tau)

Backward, from the layers' gradients of A, g B and c (adapted_linear.py):

    dm = dc / (n + tau)      dtau = dn = -dm c      dB = g d(gB) + (dn g / n) K      M = dL/dU = (dn g / n) B
    dA = dA of the branch + M^T (W0 + g B A)

Half precision uses A rounded to W0's dtype, in the branch and in the norm, so the norm is that of the weight in use.
Autograd carries the gradients from the layers to here: what a layer takes are *ports*, zero-stride float32 outputs
without memory of their own. A layer called twice adds up; of a layer that was not called all parameters get None.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from doran_core.errors import BackendError
from doran_core.kernels.adapted_linear import SECOND_DERIVATIVE, LayerSide, without_autocast
from doran_core.kernels.passes import Shape
from doran_core.support.torch_internals import apply_directly

__all__ = ["Product", "Stack", "compute", "now", "refresh"]

_epoch = [0]


def refresh() -> None:
    """Use no weight side again that was computed before; call it after writes that PyTorch does not count."""
    _epoch[0] += 1


def now() -> int:
    """Changes with :func:`refresh`."""
    return _epoch[0]


@contextmanager
def _precision(shape: Shape) -> Iterator[None]:
    """Autocast off; for layers in bfloat16 float32 products in tf32, 8 times as precise as what they are rounded to.

    The float32 products of a GPU's libraries are slow at these sizes: they took 2 ms of a step of 80.
    """
    with without_autocast(shape.squared_norm):
        before = torch.get_float32_matmul_precision()
        if shape.dtype != torch.bfloat16 or before != "highest":
            yield
            return
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class Product(torch.autograd.Function):
    """``left @ right`` of N matrices each, in :func:`_precision`: ``apply(shape, left, right)``."""

    @staticmethod
    def forward(ctx: Any, shape: Shape, left: Tensor, right: Tensor) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(left, right)
        with _precision(shape):
            return left @ right

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        left, right = ctx.saved_tensors
        with _precision(ctx.shape):
            return None, grad @ right.mT, left.mT @ grad


class Stack(torch.autograd.Function):
    """``torch.stack`` of one parameter a layer, some of them perhaps shared by layers.

    The gradient of a parameter that no layer in use depends on is None, as it is where layers are computed one by one.
    ``apply(used, index, *parameters)``: layer i has ``parameters[index[i]]``; ``used`` is that of :func:`compute`.
    """

    @staticmethod
    def forward(ctx: Any, used: list[bool], index: Sequence[int], *parameters: Tensor) -> Tensor:
        ctx.used, ctx.index, ctx.count = used, index, len(parameters)
        return torch.stack([parameters[i] for i in index])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        users: list[list[int]] = [[] for _ in range(ctx.count)]
        for layer, parameter in enumerate(ctx.index):
            users[parameter].append(layer)
        found: list[Tensor | None] = []
        # DistributedDataParallel waits for the gradient of every parameter that the graph reaches: so layers that were
        # not used give zeros there.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        wanted, parts = [True] * len(ctx.used) if distributed else ctx.used, grad.unbind()
        for layers, needed in zip(users, ctx.needs_input_grad[2:], strict=True):
            if not needed or not any(map(wanted.__getitem__, layers)):
                found.append(None)
            else:
                found.append(parts[layers[0]] if len(layers) == 1 else torch.stack([parts[i] for i in layers]).sum(0))
        return None, None, *found


def compute(
    shape: Shape, used: list[bool], A: Tensor, B: Tensor, magnitude: Tensor, tau: Tensor, U: Tensor | None
) -> list[LayerSide]:
    """The layers' weight sides; with ports where gradients are enabled. Call this with autocast off.

    Args:
        shape: what they have in common.
        used: a list of this pass; its backward pass writes there which layers it came from.
        A: ``[N, r, d_in]`` acc.
        B: ``[N, d_out, r]`` acc.
        magnitude: ``[N, d_out]`` acc.
        tau: ``[N, 1]`` or ``[N, d_out]`` acc.
        U: ``W0 A^T [N, d_out, r]`` acc, where W0 is hidden.
    """
    A, B = A.contiguous(), B.contiguous()  # a generator may give a transpose, and kernels take rows
    *ports, low_A, low_B, scale = _apply(shape, used, A, B, magnitude, tau, U)
    small = _small_scales(scale, shape.least_scales)
    count, learns = len(scale), torch.is_grad_enabled()
    sides = []
    for layer, values in enumerate(zip(low_A.unbind(), low_B.unbind(), scale.unbind(), strict=True)):
        own = (ports[layer], ports[count + layer], ports[2 * count + layer]) if learns else None
        sides.append(LayerSide(*values, shape.passes, functools.partial(small, layer), own))
    return sides


class WeightSide(torch.autograd.Function):
    """:func:`compute` for autograd: the ports of A, B and c, each for all layers; then A, g B and c as layers use them.

    The last three have no gradients: they go through the ports.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shape: Shape,
        used: list[bool],
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        tau: Tensor,
        U: Tensor | None,
    ) -> tuple[Tensor, ...]:
        low_A, low_B = A.to(shape.dtype), (B * shape.scaling).to(shape.dtype)
        with _precision(shape):
            K, norm, scale = shape.passes.row_scales(shape, U, low_A if U is None else A, B, magnitude, tau)
        ctx.shape, ctx.used = shape, used
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(low_A, low_B, scale)
        ctx.save_for_backward(low_A if U is None else A, B, tau, K, norm, scale)
        port = B.new_empty(1)
        sizes = A.shape, B.shape, (A.shape[0], shape.passes.sum_parts(B.shape[1]), B.shape[1])
        return *(each for size in sizes for each in port.expand(size).unbind()), low_A, low_B, scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackendError(SECOND_DERIVATIVE)
        refresh()  # what follows a backward pass may change parameters past PyTorch's counters
        ports = grads[:-3]
        count = len(ports) // 3
        ctx.used[:] = [port is not None for port in ports[2 * count :]]
        saved = ctx.saved_tensors
        with _precision(ctx.shape):
            return None, None, *_backward(ctx.shape, ports, *saved)


_apply = apply_directly(WeightSide)


def _backward(
    shape: Shape,
    ports: Sequence[Tensor | None],
    A: Tensor,
    B: Tensor,
    tau: Tensor,
    K: Tensor,
    norm: Tensor,
    scale: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of A, B, magnitude, tau and U from those of the ports."""
    count, parts = A.shape[0], shape.passes.sum_parts(B.shape[1])
    grad_A, grad_B, sums = (
        _stacked(ports[kind * count : (kind + 1) * count], B, size)
        for kind, size in enumerate((A.shape[1:], B.shape[1:], (parts, B.shape[1])))
    )
    denominator = norm + tau
    grad_magnitude = sums.sum(1).div_(denominator).masked_fill_(denominator <= 0, 0.0)
    grad_norm = (grad_magnitude * scale).neg_()
    grad_tau = grad_norm if tau.shape == norm.shape else grad_norm.sum(1, keepdim=True)
    grad_B.mul_(shape.scaling)
    grad_U = None
    if not shape.detach_norm:
        through = (grad_norm * shape.scaling).div_(norm).masked_fill_(norm <= 0, 0.0)[..., None]
        grad_B.addcmul_(through, K)
        grad_U = through * B
        grad_A.baddbmm_(grad_U.mT @ B, A.to(B.dtype), alpha=shape.scaling)
        if shape.weights:
            shape.passes.add_weight_products(shape, grad_A, grad_U.to(shape.weights[0].dtype))
    return grad_A, grad_B, grad_magnitude, grad_tau, None if shape.weights else grad_U


def _stacked(gradients: Sequence[Tensor | None], like: Tensor, size: Sequence[int]) -> Tensor:
    """``[N, ...]``; zeros for layers without a gradient."""
    if any(map(operator.is_, gradients, itertools.repeat(None))):
        zeros = like.new_zeros(size)
        gradients = [zeros if each is None else each for each in gradients]
    return torch.stack(gradients)  # type: ignore[arg-type]


def _small_scales(scale: Tensor, limits: Sequence[float]) -> Callable[[int], bool]:
    """Tells of a layer whether it has a scale too near 0 for y to tell the output before scaling."""
    least, event = scale.abs().amin(1), None
    if least.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return lambda layer: True  # a graph's replays cannot ask: compute W0 x again always
        on_device, least = least, torch.empty(least.shape, dtype=least.dtype, pin_memory=True)
        least.copy_(on_device, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()

    @functools.cache
    def all_of_them() -> list[bool]:
        if event is not None:
            event.synchronize()  # recorded a whole forward ago
        # not (a >= b): a scale that is not a number is small
        return [not value >= limit for value, limit in zip(least.tolist(), limits, strict=True)]

    return lambda layer: all_of_them()[layer]
