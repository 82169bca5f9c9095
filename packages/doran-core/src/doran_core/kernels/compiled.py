"""The layer as one operator of PyTorch, which torch.compile takes into its graph without looking inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doran_core.kernels.layer import Facts, Inputs, Kept, backward, forward
from doran_core.kernels.passes import Assembled

__all__ = ["adapted_linear_op"]

# Operators take plain arguments and return tensors: what a record holds is spread out here and put together inside.


@torch.library.custom_op("doran::adapted_linear", mutates_args=())
def _forward(
    low_rank_input: Tensor,
    weight: Tensor | None,
    base_output: Tensor,
    product: Tensor | None,
    bias: Tensor | None,
    squared_norm: Tensor,
    magnitude: Tensor,
    tau: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    detach_norm: bool,
    repair: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(None, low_rank_input, weight, base_output, product, bias, squared_norm, magnitude, tau, (A, B))
    y, kept = forward(Facts(scaling, detach_norm, repair, implementation), inputs)  # type: ignore[arg-type]
    low_A = kept.A.clone() if kept.A is A else kept.A  # operators do not return what they were given
    return y, low_A, kept.hidden, *kept.assembled


@_forward.register_fake
def _(
    low_rank_input: Tensor,
    weight: Tensor | None,
    base_output: Tensor,
    product: Tensor | None,
    bias: Tensor | None,
    squared_norm: Tensor,
    magnitude: Tensor,
    tau: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    detach_norm: bool,
    repair: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    low = low_rank_input
    return (
        low.new_empty(*low.shape[:-1], B.shape[0]),
        torch.empty_like(A, dtype=low.dtype),
        low.new_empty(low.numel() // low.shape[-1], B.shape[1]),
        torch.empty_like(B),
        torch.empty_like(squared_norm),
        torch.empty_like(squared_norm),
        torch.empty_like(B, dtype=low.dtype),
    )


@torch.library.custom_op("doran::adapted_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    low_A: Tensor,
    hidden: Tensor,
    aligned: Tensor,
    norm: Tensor,
    scale: Tensor,
    scaled_B: Tensor,
    low_rank_input: Tensor,
    weight: Tensor | None,
    base_output: Tensor,
    bias: Tensor | None,
    squared_norm: Tensor,
    magnitude: Tensor,
    tau: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    detach_norm: bool,
    repair: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(None, low_rank_input, weight, base_output, None, bias, squared_norm, magnitude, tau, (A, B))
    facts = Facts(scaling, detach_norm, repair, implementation)  # type: ignore[arg-type]
    kept = Kept(low_A, B, tau, hidden, Assembled(aligned, norm, scale, scaled_B))
    _, *found, factors = backward(facts, inputs, kept, base_output, grad)
    return tuple(grad.new_empty(0) if g is None else g for g in (*found, *factors))  # type: ignore[return-value]


@_backward.register_fake
def _(
    grad: Tensor,
    low_A: Tensor,
    hidden: Tensor,
    aligned: Tensor,
    norm: Tensor,
    scale: Tensor,
    scaled_B: Tensor,
    low_rank_input: Tensor,
    weight: Tensor | None,
    base_output: Tensor,
    bias: Tensor | None,
    squared_norm: Tensor,
    magnitude: Tensor,
    tau: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    detach_norm: bool,
    repair: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    nothing = grad.new_empty(0)
    return (
        low_rank_input.new_empty(low_rank_input.shape),
        base_output.new_empty(base_output.shape),
        nothing if weight is not None or detach_norm else torch.empty_like(B),
        torch.empty_like(magnitude),
        torch.empty_like(tau),
        torch.empty_like(A),
        torch.empty_like(B),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scaling, detach_norm, repair, implementation = inputs
    ctx.facts = (scaling, detach_norm, repair, implementation)
    ctx.hides_weight = tensors[_PRODUCT] is not None and not detach_norm
    ctx.save_for_backward(*output[1:], *tensors[:_PRODUCT], *tensors[_PRODUCT + 1 :])


def _take_gradient(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grad_low, grad_base, grad_product, *rest = _backward(grad, *ctx.saved_tensors, *ctx.facts)
    return grad_low, None, grad_base, grad_product if ctx.hides_weight else None, None, None, *rest, *(None,) * 4


_PRODUCT = 3
"""Where ``product`` stands among the operator's tensors."""

_forward.register_autograd(_take_gradient, setup_context=_setup_context)


def adapted_linear_op(facts: Facts, inputs: Inputs) -> Tensor:
    """:class:`~doran_core.kernels.layer.AdaptedLinear` as an operator; ``y`` has the shape of the base output given."""
    y: Tensor = _forward(*inputs.spread()[1:], facts.scaling, facts.detach_norm, facts.repair, facts.implementation)[0]
    return y
