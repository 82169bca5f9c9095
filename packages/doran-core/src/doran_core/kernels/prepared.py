"""An adapted linear layer whose weight side is done: A, B' and c are given, and what it learns of them is sent back.

The same function as layer.py's, without what weight_side.py does for all layers at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core.errors import BackendError
from doran_core.kernels.fleet import Given
from doran_core.kernels.layer import (
    SECOND_DERIVATIVE,
    WriteCounter,
    base_product,
    flat,
    without_autocast,
)
from doran_core.kernels.sides import Sent
from doran_core.kernels.triton_passes import TritonPasses

__all__ = ["apply"]

_PASSES = TritonPasses()


class PreparedLinear(torch.autograd.Function):
    """:func:`apply` for autograd.

    ``low_rank_input`` is the branch's input where that is not x. y is kept, and noticed if written to in place, as in
    :class:`~doran_core.kernels.layer.AdaptedLinear`, unless ``given.recomputes``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: Given,
        ticket: Tensor,
        x: Tensor,
        low_rank_input: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        side, recomputes = given.side, given.recomputes
        rows = flat(x)
        low = None if low_rank_input is None else flat(low_rank_input)
        hidden = F.linear(rows if low is None else low, side.A)
        y = base_product(x, weight, bias)
        _PASSES.expand(y, hidden, side.scaled_B, side.scale, bias, inplace=True)
        if side.keepers is not None:
            side.keepers.note(side.layer, y, is_kept=not recomputes)
        ctx.side, ctx.writes, ctx.shape = side, None if recomputes else WriteCounter(y), x.shape
        kept = rows if x.is_contiguous() else x  # not a copy beside what others keep
        ctx.save_for_backward(None if recomputes else y.data, hidden, kept, low, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackendError(SECOND_DERIVATIVE)
        y, hidden, x, low, weight, bias = ctx.saved_tensors
        side, rows = ctx.side, flat(x)
        if side.keepers is not None:
            side.keepers.look()
        _, need_ticket, need_x, need_low, *_ = ctx.needs_input_grad
        # A pass for the gradients of some inputs alone may leave the weight side out.
        need_ticket = need_ticket and torch._C._will_engine_execute_node(ctx.next_functions[0][0])
        with without_autocast(grad):
            grad = flat(grad).contiguous()
            of_output = not (ctx.writes is None or ctx.writes.moved() or side.is_small())
            if not of_output:
                y, bias = F.linear(rows, weight), None
            scaled_grad, sums = _PASSES.scale_gradient(grad, y, side.scale, bias)
            grad_hidden = torch.mm(grad, side.scaled_B)
            if need_ticket:
                for_A = _PASSES.product(grad_hidden.t(), rows if low is None else low)
                for_B = _PASSES.product(grad.t(), hidden)
                side.sent.append(Sent(torch._C._current_graph_task_id(), for_A, for_B, sums, of_output))
            grad_x = grad_low = None
            if need_x:
                grad_x = torch.mm(scaled_grad, weight)
                if low is None:
                    grad_x.addmm_(grad_hidden, side.A)
                grad_x = grad_x.view(ctx.shape)
            if need_low:
                grad_low = torch.mm(grad_hidden, side.A).view(ctx.shape)
        return None, None, grad_x, grad_low, None, None


def apply(given: Given, x: Tensor, low_rank_input: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The adapted output, ``[..., d_out]``. Call this where no function transform is active.

    Args:
        given: the layer's part of a weight side.
        x: the base layer's input, ``[..., d_in]``.
        low_rank_input: the branch's, where that is not x.
        weight: W0.
        bias: ``[d_out]`` or None.
    """
    y: Tensor = _apply(given, given.ticket, x, low_rank_input, weight, bias)  # type: ignore[no-untyped-call]
    return y


_apply = super(torch.autograd.Function, PreparedLinear).apply
"""Past what Function.apply does for function transforms."""
