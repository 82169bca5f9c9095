"""The output of stacked experts, whose rows are grouped by expert, as an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doran_core.kernels.backend import choose
from doran_core.kernels.passes import TorchPasses, passes_of
from doran_core.support.torch_internals import needs_single_operations

__all__ = ["scale_expert_rows"]


def scale_expert_rows(base_output: Tensor, delta: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    """``y = c z + delta``, ``[T, d_out]`` in the dtype of z, with the c of each row's expert.

    The backward pass needs z and c. No copy of c for each row of z is made or saved by the kernels.

    Args:
        base_output: z ``[T, d_out]``, the rows of each expert together.
        delta: ``[T, d_out]``.
        scale: c ``[experts, d_out]``, float32 or wider.
        ends: ``[experts]``, where each expert's rows end; rows after the last end are the last expert's.
    """
    y: Tensor = _ExpertRows.apply(base_output, delta, scale, ends)  # type: ignore[no-untyped-call]
    return y


def _passes(base_output: Tensor, scale: Tensor) -> TorchPasses:
    dtype = torch.float64 if scale.dtype == torch.float64 else base_output.dtype
    implementation = choose(base_output.device, dtype)
    return passes_of("triton" if implementation == "triton" and not needs_single_operations() else "torch")


class _ExpertRows(torch.autograd.Function):
    @staticmethod
    def forward(base_output: Tensor, delta: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
        return _passes(base_output, scale).expert_rows(base_output, delta, scale, ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
        base_output, delta, scale, ends = inputs
        ctx.save_for_backward(base_output, scale, ends)
        ctx.delta_dtype = delta.dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        base_output, scale, ends = ctx.saved_tensors
        (grad,) = grad_outputs
        passes = passes_of("torch") if torch.is_grad_enabled() else _passes(base_output, scale)  # create_graph=True
        scaled, sums = passes.expert_rows_gradient(grad, base_output, scale, ends)
        return scaled, grad.to(ctx.delta_dtype), sums, None
