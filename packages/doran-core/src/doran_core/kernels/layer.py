"""One adapted linear layer with a backward written by hand: the base product, two thin products and fused passes.

Forward, with ``dtype`` that of the layer and everything per row of W0 in float32 (float64 for a float64 base):

    U = W0 A^T        K = U + g B (A A^T) = V A^T        n^2 = ||W0||^2 + g sum(B * (U + K), 1)
    c = m / (n + tau)        B' = c g B        y = c z + (1 - c) bias + (x A^T) B'^T        z = W0 x + bias

Backward, from G = dL/dy, summed over tokens t:

    dc = sum_t G (y - bias) / c       dm = dc / (n + tau)       dtau = dn = -dc c / (n + tau)
    P = G^T (x A^T)      dB = c g P + (dn g / n) K      M = dL/dU = (dn g / n) B
    dA = (G B')^T x + M^T (W0 + g B A)      dx = (c G) W0 + (G B') A

``dc`` needs the output before scaling. It is not kept: y, which the next layer often keeps anyway, stands in for it,
and where c is near 0 that product is computed again. Half precision uses A rounded to the layer's dtype, in the branch
and in the norm, so the norm is that of the weight in use. The factored norm is arXiv 2510.04331's V in the form of
docs/architecture.md; ``dL/dV = c (G_orthogonal + tau / (n + tau) G_parallel)`` is what this backward amounts to.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core import functional
from doran_core.errors import BackendError
from doran_core.kernels.backend import Implementation
from doran_core.kernels.networks import Networks
from doran_core.kernels.passes import Assembled, Passes, Source, TorchPasses, added, small_scale

__all__ = [
    "SECOND_DERIVATIVE",
    "AdaptedLinear",
    "Facts",
    "Gradients",
    "Inputs",
    "Kept",
    "WriteCounter",
    "backward",
    "base_product",
    "flat",
    "forward",
    "passes_of",
    "shaped_as",
    "unflattened",
    "without_autocast",
]

SECOND_DERIVATIVE = (
    "the hand-written backward of an adapted layer has no derivative of its own (create_graph=True): "
    "use doran_core.kernels.use_backend('reference')"
)


@dataclass(frozen=True)
class Facts:
    """What a layer's computation depends on besides tensors.

    Attributes:
        scaling: ``g``.
        detach_norm: no gradient through the norm.
        repair: take the norm directly where V nearly cancels.
        implementation: who computes the passes.
        slope: of the factor networks' activation left of 0; None if A and B are given themselves.
        raw_tau: tau is given before its softplus.
    """

    scaling: float
    detach_norm: bool
    repair: bool
    implementation: Implementation
    slope: float | None = None
    raw_tau: bool = False


class Inputs(NamedTuple):
    """Tensors of one call. Either ``base_output`` is given, or ``x`` and ``weight`` make it here.

    Attributes:
        x: the base layer's input, ``[..., d_in]``; None with ``base_output``.
        low_rank_input: the branch's input, ``[..., d_in]``; None if it is ``x``.
        weight: W0 ``[d_out, d_in]``, or None if the layer hides it.
        base_output: ``W0 x + bias``, ``[..., d_out]``, or None.
        product: ``U``, ``[d_out, r]``, for a layer that hides its weight, else None.
        bias: ``[d_out]`` or None.
        squared_norm: ``[d_out]`` acc.
        magnitude: ``[d_out]`` acc.
        tau: acc, ``[1]`` or ``[d_out]``; raw, also one a group of rows.
        factors: ``(A [r, d_in], B [d_out, r])`` acc, or the six parameters of the networks that make them.
    """

    x: Tensor | None
    low_rank_input: Tensor | None
    weight: Tensor | None
    base_output: Tensor | None
    product: Tensor | None
    bias: Tensor | None
    squared_norm: Tensor
    magnitude: Tensor
    tau: Tensor
    factors: tuple[Tensor, ...]

    @classmethod
    def of(cls, *tensors: Any) -> Inputs:
        """From its fields with the factors spread out."""
        fixed = len(cls._fields) - 1
        return cls._make((*tensors[:fixed], tensors[fixed:]))

    def spread(self) -> tuple[Tensor | None, ...]:
        """The inverse of :meth:`of`."""
        return *self[:-1], *self.factors

    @property
    def branch_input(self) -> Tensor:
        """The input of the low-rank branch."""
        tensor = self.x if self.low_rank_input is None else self.low_rank_input
        assert tensor is not None
        return tensor


class Kept(NamedTuple):
    """What the backward needs of the forward, besides its inputs.

    Attributes:
        A: ``[r, d_in]`` in the layer's dtype.
        B: ``[d_out, r]`` acc.
        tau: ``[1]`` or ``[d_out]`` acc.
        hidden: ``h = x A^T``, ``[T, r]``.
        assembled: what the factors make of the layer.
    """

    A: Tensor
    B: Tensor
    tau: Tensor
    hidden: Tensor
    assembled: Assembled

    @classmethod
    def of(cls, *tensors: Tensor) -> Kept:
        """From its fields with those of ``assembled`` spread out."""
        return cls._make((*tensors[:4], Assembled(*tensors[4:])))

    def spread(self) -> tuple[Tensor, ...]:
        """The inverse of :meth:`of`."""
        return *self[:-1], *self.assembled


class Gradients(NamedTuple):
    """By the names of :class:`Inputs`; None for what was not asked for."""

    x: Tensor | None
    low_rank_input: Tensor | None
    base_output: Tensor | None
    product: Tensor | None
    magnitude: Tensor
    tau: Tensor
    factors: tuple[Tensor, ...]


@functools.cache
def passes_of(implementation: Implementation) -> Passes:
    """The passes of an implementation. Triton is imported here and not before."""
    if implementation == "triton":
        from doran_core.kernels.triton_passes import TritonPasses

        return TritonPasses()
    return TorchPasses()


def flat(tensor: Tensor) -> Tensor:
    """``[..., d]`` as ``[T, d]``."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W0 x + bias``, ``[..., d_out]``, as a tensor that is no view: what a Function returns may not be one."""
    if x.dim() == 2 or bias is None:
        return F.linear(x, weight, bias)
    return unflattened(F.linear(flat(x), weight, bias), x)


def unflattened(rows: Tensor, like: Tensor) -> Tensor:
    """``[T, d]`` with the other dimensions of ``like``, and no view of it."""
    return rows if like.dim() == 2 else torch.ops.aten._unsafe_view.default(rows, (*like.shape[:-1], rows.shape[1]))


def forward(facts: Facts, inputs: Inputs) -> tuple[Tensor, Kept]:
    """``y [..., d_out]`` and what to keep."""
    passes = passes_of(facts.implementation)
    weight, low = inputs.weight, flat(inputs.branch_input)
    if facts.slope is None:
        wide_A, B = inputs.factors
    else:
        one_dtype = weight is not None and weight.dtype == low.dtype
        dtype = low.dtype if one_dtype else inputs.factors[0].dtype
        wide_A, B = passes.generate(Networks(*inputs.factors), facts.slope, dtype)
    tau = functional.per_row(F.softplus(inputs.tau), B.shape[0]) if facts.raw_tau else inputs.tau
    A = norm_A = wide_A.to(low.dtype)
    if weight is None:
        norm_A = wide_A
    elif weight.dtype != A.dtype:
        norm_A = wide_A.to(weight.dtype)
    assembled = passes.assemble(
        weight,
        None if inputs.product is None else inputs.product.clone(),
        norm_A,
        B,
        inputs.squared_norm,
        inputs.magnitude,
        tau,
        facts.scaling,
        low.dtype,
        repair=facts.repair,
    )
    hidden = low @ A.T
    base_output = inputs.base_output
    if base_output is None:
        assert inputs.x is not None
        assert weight is not None
        base_output = base_product(inputs.x, weight, inputs.bias)
    y = passes.expand(
        flat(base_output),
        hidden,
        assembled.scaled_B,
        assembled.scale,
        inputs.bias,
        inplace=inputs.base_output is None,
    )
    y = base_output if inputs.base_output is None else unflattened(y, base_output)
    return y, Kept(A, B, tau, hidden, assembled)


def backward(
    facts: Facts,
    inputs: Inputs,
    kept: Kept,
    output: Tensor,
    grad: Tensor,
    *,
    output_changed: bool = False,
    need_input: bool = True,
) -> Gradients:
    """The gradients.

    Args:
        facts: of the forward pass.
        inputs: of the forward pass.
        kept: what it kept.
        output: what it returned, or the base layer's output if that was given.
        grad: of the output, ``[..., d_out]``.
        output_changed: ``output`` was written to since, so the base layer's output is to be computed again.
        need_input: ``x``, the branch's input and the base layer's output need gradients.
    """
    passes = passes_of(facts.implementation)
    weight, bias, low = inputs.weight, inputs.bias, flat(inputs.branch_input)
    assembled, own_base = kept.assembled, inputs.base_output is None
    source, output, flat_grad = None, flat(output), flat(grad).contiguous()
    if own_base:
        assert inputs.x is not None
        assert weight is not None
        x = flat(inputs.x)
        if output_changed:
            output, bias = F.linear(x, weight), None
        else:
            source = Source(flat_grad, x, weight, small_scale(output.dtype, has_bias=bias is not None))
    scaled_grad, sums = passes.scale_gradient(flat_grad, output, assembled.scale, bias)
    finished = passes.finish(
        sums,
        passes.product(flat_grad.T, kept.hidden),
        assembled,
        kept.B,
        inputs.magnitude,
        kept.tau,
        facts.scaling,
        kept.B.dtype if weight is None else weight.dtype,
        source,
        inputs.tau if facts.raw_tau else None,
        detach_norm=facts.detach_norm,
    )
    grad_hidden = flat_grad @ assembled.scaled_B
    grad_A = passes.gradient_of_A(grad_hidden, low, finished.product, weight, kept.A, kept.B, facts.scaling)
    grad_x = grad_low = None
    if need_input:
        if own_base:
            assert weight is not None
            grad_x = scaled_grad @ weight
        if inputs.low_rank_input is None:
            assert grad_x is not None
            grad_x.addmm_(grad_hidden, kept.A)
        else:
            grad_low = grad_hidden @ kept.A
    factors: tuple[Tensor, ...]
    if facts.slope is None:
        factors = added(grad_A), finished.B
    else:
        factors = passes.generate_gradients(Networks(*inputs.factors), facts.slope, grad_A, finished.B)
    return Gradients(
        shaped_as(grad_x, inputs.x),
        shaped_as(grad_low, inputs.low_rank_input),
        None if own_base else shaped_as(scaled_grad, inputs.base_output),
        finished.product if weight is None else None,
        finished.magnitude,
        _per_group(finished.tau, inputs.tau.numel()),
        factors,
    )


def _per_group(rows: Tensor, groups: int) -> Tensor:
    """The sum over each group of neighbouring rows."""
    return rows if rows.numel() == groups else rows.view(groups, -1).sum(1)


def shaped_as(rows: Tensor | None, like: Tensor | None) -> Tensor | None:
    """``[T, d]`` in the shape of what was flattened."""
    return rows if rows is None or like is None or like.dim() == 2 else rows.view(like.shape)


class WriteCounter:
    """Tells whether a tensor was written to in place, without keeping its memory.

    Args:
        tensor: to watch.
    """

    def __init__(self, tensor: Tensor) -> None:
        # An alias shares its tensor's counter of writes, and goes on sharing it once it has other data.
        self._alias = tensor.detach()
        self._alias.data = tensor.new_empty(0)
        self._start = tensor._version

    def moved(self) -> bool:
        """Whether it was written to since."""
        return self._alias._version != self._start


class AdaptedLinear(torch.autograd.Function):
    """:func:`forward` and :func:`backward` for autograd; ``apply(facts, *inputs)`` gives ``y``.

    It keeps the memory of ``y``. Later operations in place are noticed; writes through ``y.data``, which PyTorch does
    not count, are not, and need the backend "reference". So do second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, facts: Facts, *tensors: Tensor | None) -> Tensor:
        inputs = Inputs.of(*tensors)
        with without_autocast(inputs.magnitude):
            y, kept = forward(facts, inputs)
        ctx.facts = facts
        ctx.writes = None if inputs.base_output is not None else WriteCounter(y)
        # `.data` leaves autograd's own check of the output out: a later in-place activation is legal, see backward.
        output = y.data if inputs.base_output is None else inputs.base_output
        ctx.save_for_backward(output, *kept.spread(), *inputs.spread())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackendError(SECOND_DERIVATIVE)
        output, *saved = ctx.saved_tensors
        inputs = Inputs.of(*saved[_KEPT:])
        wanted = dict(zip(Inputs._fields, ctx.needs_input_grad[1:], strict=False))
        with without_autocast(grad):
            found = backward(
                ctx.facts,
                inputs,
                Kept.of(*saved[:_KEPT]),
                output,
                grad,
                output_changed=ctx.writes is not None and ctx.writes.moved(),
                need_input=wanted["x"] or wanted["low_rank_input"] or wanted["base_output"],
            )._asdict()
        factors = found.pop("factors")
        return None, *(found.get(name) for name in Inputs._fields[:-1]), *factors


_KEPT = len(Kept._fields) - 1 + len(Assembled._fields)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off for the tensor's device; for free where it is off already."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
