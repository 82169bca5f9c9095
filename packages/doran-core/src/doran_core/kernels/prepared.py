"""An adapted linear layer whose weight side is done: A, B' and c are given, and their gradients go back by a ticket.

The same function as layer.py's, without what weight_side.py does for all layers at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core.errors import BackendError
from doran_core.kernels.layer import (
    SECOND_DERIVATIVE,
    WriteCounter,
    base_product,
    flat,
    passes_of,
    shaped_as,
    without_autocast,
)
from doran_core.kernels.weight_side import Side

__all__ = ["PreparedLinear"]


class PreparedLinear(torch.autograd.Function):
    """``apply(side, ticket, x, low_rank_input, weight, bias)`` gives y ``[..., d_out]``.

    ``low_rank_input`` is the branch's input where that is not x. y is kept, and noticed if written to in place, as in
    :class:`~doran_core.kernels.layer.AdaptedLinear`, unless ``side.repeats``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        side: Side,
        ticket: Tensor,
        x: Tensor,
        low_rank_input: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        with without_autocast(ticket):
            hidden = flat(x if low_rank_input is None else low_rank_input) @ side.A.T
            y = base_product(x, weight, bias)
            passes_of("triton").expand(flat(y), hidden, side.scaled_B, side.scale, bias, inplace=True)
        ctx.side, ctx.writes = side, None if side.repeats else WriteCounter(y)
        ctx.save_for_backward(None if side.repeats else y.data, hidden, x, low_rank_input, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackendError(SECOND_DERIVATIVE)
        y, hidden, x, low_rank_input, weight, bias = ctx.saved_tensors
        side: Side = ctx.side
        _, need_ticket, need_x, need_low, *_ = ctx.needs_input_grad
        with without_autocast(grad):
            flat_grad, wide_x = flat(grad).contiguous(), flat(x)
            passes = passes_of("triton")
            side.of_output = not (ctx.writes is None or ctx.writes.moved() or side.is_small())
            if not side.of_output:
                y, bias = F.linear(wide_x, weight), None
            sent = torch.empty(side.ticket_size, dtype=torch.float32, device=grad.device)
            for_A, for_B, sums = _split(side, sent)
            scaled_grad, _ = passes.scale_gradient(flat_grad, flat(y), side.scale, bias, sums)
            grad_hidden = flat_grad @ side.scaled_B
            if need_ticket:
                low = wide_x if low_rank_input is None else flat(low_rank_input)
                passes.product(flat_grad.T, hidden, for_B)
                passes.product(grad_hidden.T, low, for_A)
            grad_x = grad_low = None
            if need_x:
                grad_x = scaled_grad @ weight
                if low_rank_input is None:
                    grad_x.addmm_(grad_hidden, side.A)
            if need_low:
                grad_low = shaped_as(grad_hidden @ side.A, low_rank_input)
        return None, sent if need_ticket else None, shaped_as(grad_x, x), grad_low, None, None


def _split(side: Side, sent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of a ticket's gradient: ``[r, d_in]``, ``[d_out, r]``, ``[parts, d_out]``."""
    (rank, d_in), d_out = side.A.shape, side.scale.shape[0]
    for_A, for_B, sums = torch.split_with_sizes(sent, [rank * d_in, d_out * rank, side.parts * d_out])
    return for_A.view(rank, d_in), for_B.view(d_out, rank), sums.view(side.parts, d_out)
