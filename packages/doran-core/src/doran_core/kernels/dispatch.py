"""From a base layer's view and an adapter's tensors to the implementation that can run them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doran_core.kernels.backend import Implementation, choose, triton_can_run
from doran_core.kernels.entries import Member
from doran_core.kernels.fleet import Fleet
from doran_core.kernels.layer import AdaptedLinear, Facts, Inputs, forward, without_autocast

if TYPE_CHECKING:
    from doran_core.layers.base import BaseView  # which imports this module

__all__ = ["PREPARED_DTYPES", "choose_for", "makes_product", "run", "run_prepared"]

PREPARED_DTYPES = [torch.bfloat16, torch.float16]
"""Precisions of the layers whose weight sides are computed together; a test adds float32."""


def choose_for(view: BaseView, x: Tensor, magnitude: Tensor, *, norm_method: str) -> Implementation:
    """The implementation for one call of a layer.

    The reference computes what the others do not: embeddings and convolutions, a trained bias, a norm that is to be
    taken directly, tensor subclasses, function transforms, modes that see or replace single operations, such as
    selective checkpointing's.

    Raises:
        BackendError: triton was asked for by name and cannot run on these tensors.
    """
    bias = view.bias
    special = (
        view.kind in ("embedding", "conv2d", "conv")
        or norm_method == "direct"
        or not x.is_floating_point()
        or not _is_ordinary(view.weight())
        or _is_for_autograd(x, bias)
    )
    if special:
        return "reference"
    return choose(x.device, magnitude.dtype if magnitude.dtype == torch.float64 else x.dtype)


def _is_for_autograd(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a call needs PyTorch's own operations, whatever the layer.

    A mode that sees single operations may keep what the other implementations write over.
    """
    return (
        x.numel() == 0
        or (bias is not None and bias.requires_grad)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _is_ordinary(weight: Tensor | None) -> bool:
    return weight is None or (type(weight) in (Tensor, nn.Parameter) and not weight.requires_grad)


def run(
    implementation: Implementation,
    view: BaseView,
    x: Tensor,
    base_output: Tensor | None,
    factors: tuple[Tensor, ...],
    magnitude: Tensor,
    tau: Tensor | float,
    squared_norm: Tensor,
    *,
    scaling: float,
    detach_norm: bool,
    repair: bool,
    dropout: float,
    slope: float | None = None,
    raw_tau: bool = False,
) -> Tensor:
    """The adapted output, shaped as the base layer's.

    Args:
        implementation: "torch" or "triton".
        view: of a linear base layer.
        x: its input, ``[..., d_in]``.
        base_output: what it made of x, or None to leave it to this function.
        factors: A ``[r, d_in]`` and B ``[d_out, r]``, or the parameters of their networks.
        magnitude: ``[d_out]``.
        tau: 0, ``[1]`` or ``[d_out]``.
        squared_norm: ``||W0||^2``, ``[d_out]``.
        scaling: ``g``.
        detach_norm: no gradient through the norm.
        repair: take the norm directly where V nearly cancels.
        dropout: probability of dropping an element of the branch's input.
        slope: of the networks' activation left of 0; None if the factors are A and B.
        raw_tau: tau is given before its softplus.
    """
    weight = view.weight()
    if base_output is None and not makes_product(view, x):
        base_output = view.layer(x)
    low_rank_input = None if base_output is None else x.to(base_output.dtype)
    if dropout > 0.0:
        low_rank_input = F.dropout(x if low_rank_input is None else low_rank_input, dropout)
    product = None
    if weight is None:
        with without_autocast(magnitude), torch.set_grad_enabled(torch.is_grad_enabled() and not detach_norm):
            product = view.product(factors[0])
    inputs = Inputs(
        x=x if base_output is None else None,
        low_rank_input=low_rank_input,
        weight=weight,
        base_output=base_output,
        product=product,
        bias=view.bias,
        squared_norm=squared_norm,
        magnitude=magnitude,
        tau=tau if isinstance(tau, Tensor) else magnitude.new_full((1,), tau),
        factors=factors,
    )
    facts = Facts(scaling, detach_norm, repair and weight is not None, implementation, slope, raw_tau)
    if not torch.is_grad_enabled():
        with without_autocast(magnitude):
            return forward(facts, inputs)[0]
    return AdaptedLinear.apply(facts, *inputs.spread())  # type: ignore[no-any-return, no-untyped-call]


def makes_product(view: BaseView, x: Tensor) -> bool:
    """Whether the kernels may compute the base layer's output themselves."""
    weight = view.weight()
    return weight is not None and view.is_plain and _same_precision(x, weight)


def run_prepared(fleet: Fleet, member: Member, view: BaseView, x: Tensor, *, dropout: float) -> Tensor | None:
    """The adapted output of a layer whose weight side is computed together with others; None if it is not.

    What does not change from call to call was looked at when the layer's part was made, see
    :class:`~doran_core.kernels.entries.Place`.

    Args:
        fleet: the layers that are computed together.
        member: this layer's adapter.
        view: of the base layer.
        x: its input, ``[..., d_in]``.
        dropout: probability of dropping an element of the branch's input.
    """
    if view.kind != "linear":
        return None
    if not torch.is_grad_enabled():
        fleet.release()
        return None
    own = view.layer._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if (
        weight is None
        or x.dtype not in PREPARED_DTYPES
        or not _same_precision(x, weight)
        or weight.requires_grad
        or not triton_can_run(x.device, x.dtype)
        or _is_for_autograd(x, bias)
    ):
        return None
    given = fleet.ask(member, view)
    if given is None:
        return None
    from doran_core.kernels import prepared  # which imports Triton

    low_rank_input = F.dropout(x, dropout) if dropout > 0.0 else None
    return prepared.apply(given, x, low_rank_input, weight, bias)


def _same_precision(x: Tensor, weight: Tensor) -> bool:
    """Whether the base layer would compute in the dtype of its input and weight, also under autocast."""
    if x.dtype != weight.dtype:
        return False
    kind = x.device.type
    return not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == x.dtype
