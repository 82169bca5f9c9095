"""The paper's factor networks as one kernel forward and two backward, for the sizes at which launches are what costs.

A = H_A W2_A^T    B = W2_B H_B^T    H = act(E W1^T / sqrt(e)) / h
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["SLOPES", "Networks", "fits", "generate", "gradients", "values"]

SLOPES = {"leaky_relu": 0.01, "relu": 0.0, "identity": 1.0}
"""Slope left of 0 of the activations that the kernel knows."""

_MOST_RANK = 64
_MOST_WIDTH = 128
_BLOCK = 64


class Networks(NamedTuple):
    """The parameters of a layer's two networks, float32.

    Attributes:
        embedding_A: ``[r, e]``.
        w1_A: ``[h, e]``.
        w2_A: ``[d_in, h]``.
        embedding_B: ``[r, e]``.
        w1_B: ``[h, e]``.
        w2_B: ``[d_out, h]``.
    """

    embedding_A: Tensor
    w1_A: Tensor
    w2_A: Tensor
    embedding_B: Tensor
    w1_B: Tensor
    w2_B: Tensor


def fits(networks: Networks, activation: str) -> bool:
    """Whether the kernels take these: a piecewise linear activation, small widths, one device, float32."""
    embedding, w1, w2 = networks.embedding_A, networks.w1_A, networks.w2_A
    return (
        activation in SLOPES
        and embedding.shape[0] <= _MOST_RANK
        and w1.shape[0] <= _MOST_RANK
        and embedding.shape[1] <= _MOST_WIDTH
        and all(p.dtype == torch.float32 and p.device == w2.device and p.is_contiguous() for p in networks)
    )


def _sizes(networks: Networks) -> tuple[int, int, int, int, int, dict[str, int]]:
    """``(d_in, d_out, rank, e, h)`` and the kernels' padded sizes."""
    import triton

    rank, width = networks.embedding_A.shape
    hidden = networks.w1_A.shape[0]
    padded = {name: max(16, triton.next_power_of_2(size)) for name, size in (("R", rank), ("E", width), ("H", hidden))}
    return networks.w2_A.shape[0], networks.w2_B.shape[0], rank, width, hidden, padded


def values(networks: Networks, slope: float) -> tuple[Tensor, Tensor]:
    """``(A [r, d_in], B [d_out, r])``, without a gradient."""
    import triton

    from doran_core.kernels import triton_kernels as kernels
    from doran_core.kernels.triton_passes import on_device

    d_in, d_out, rank, width, hidden, padded = _sizes(networks)
    A, B = networks.w2_A.new_empty(rank, d_in), networks.w2_B.new_empty(d_out, rank)
    blocks_A, blocks_B = triton.cdiv(d_in, _BLOCK), triton.cdiv(d_out, _BLOCK)
    with on_device(A):
        kernels.generate_kernel[(blocks_A + blocks_B,)](
            *networks, A, B, d_in, d_out, rank, width, hidden, slope, blocks_A, **padded, BLOCK=_BLOCK
        )
    return A, B


def gradients(networks: Networks, slope: float, grad_A: Tensor, grad_B: Tensor) -> Networks:
    """The gradients of the networks' parameters from those of A ``[r, d_in]`` and B ``[d_out, r]``."""
    import triton

    from doran_core.kernels import triton_kernels as kernels
    from doran_core.kernels.triton_passes import on_device

    d_in, d_out, rank, width, hidden, padded = _sizes(networks)
    found = Networks(*(torch.empty_like(parameter) for parameter in networks))
    blocks_A, blocks_B = triton.cdiv(d_in, _BLOCK), triton.cdiv(d_out, _BLOCK)
    parts = grad_A.new_empty(blocks_A + blocks_B, padded["R"], padded["H"])
    with on_device(grad_A):
        kernels.generate_outer_gradient_kernel[(blocks_A + blocks_B,)](
            *networks, grad_A.contiguous(), grad_B.contiguous(), found.w2_A, found.w2_B, parts,
            d_in, d_out, rank, width, hidden, slope, blocks_A, **padded, BLOCK=_BLOCK,
        )  # fmt: skip
        # PyTorch adds the blocks' parts faster than the two programs of the next kernel would.
        kernels.generate_inner_gradient_kernel[(2,)](
            networks.embedding_A, networks.w1_A, networks.embedding_B, networks.w1_B,
            parts[:blocks_A].sum(0), parts[blocks_A:].sum(0),
            found.embedding_A, found.w1_A, found.embedding_B, found.w1_B,
            rank, width, hidden, slope, **padded,
        )  # fmt: skip
    return found


class _Generate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slope: float, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        networks = Networks(*parameters)
        ctx.slope = slope
        ctx.save_for_backward(*networks)
        return values(networks, slope)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_A: Tensor, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        found = gradients(Networks(*ctx.saved_tensors), ctx.slope, grad_A, grad_B)
        return None, *(grad if ctx.needs_input_grad[i + 1] else None for i, grad in enumerate(found))


def generate(networks: Networks, activation: str) -> tuple[Tensor, Tensor]:
    """``(A [r, d_in], B [d_out, r])``, float32; call it if :func:`fits` says so."""
    A, B = _Generate.apply(SLOPES[activation], *networks)  # type: ignore[no-untyped-call]
    return A, B
