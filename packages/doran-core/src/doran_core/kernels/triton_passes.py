"""The passes of passes.py on a GPU, one Triton kernel each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from doran_core import functional
from doran_core.kernels import triton_kernels as kernels
from doran_core.kernels.backend import interpreting
from doran_core.kernels.networks import Networks
from doran_core.kernels.passes import Assembled, Finished, Source, TorchPasses

__all__ = ["TritonPasses", "dot_precision", "on_device"]

_MOST_RANK = 64
_MOST_WIDTH = 128
_BLOCK = 64
"""Sizes up to which a network's inner layer is one block, and columns of A or rows of B in a block."""

_PARTS = 64
"""Parts into which the tokens are cut for the sums over them: enough programs for narrow layers."""


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; this makes it the tensor's."""
    index = tensor.get_device()
    return nullcontext() if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def dot_precision(tensor: Tensor) -> str:
    """float32 products follow PyTorch's own switch for tf32; half precision has no choice."""
    return "tf32" if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _rank_block(rank: int, most: int) -> int:
    return max(16, min(most, int(triton.next_power_of_2(rank))))


class TritonPasses(TorchPasses):
    """float32, bfloat16 and float16 on a CUDA device, or anywhere under TRITON_INTERPRET=1."""

    def generate(self, parameters: Networks, slope: float) -> tuple[Tensor, Tensor]:
        sizes = _network_sizes(parameters)
        if sizes is None:
            return super().generate(parameters, slope)
        d_in, d_out, rank, width, hidden, padded = sizes
        A, B = parameters.w2_A.new_empty(rank, d_in), parameters.w2_B.new_empty(d_out, rank)
        blocks_A, blocks_B = triton.cdiv(d_in, _BLOCK), triton.cdiv(d_out, _BLOCK)
        with on_device(A):
            kernels.generate_kernel[(blocks_A + blocks_B,)](
                *parameters, A, B, d_in, d_out, rank, width, hidden, slope, blocks_A, **padded, BLOCK=_BLOCK
            )
        return A, B

    def generate_gradients(self, parameters: Networks, slope: float, grad_A: Tensor, grad_B: Tensor) -> Networks:
        sizes = _network_sizes(parameters)
        if sizes is None:
            return super().generate_gradients(parameters, slope, grad_A, grad_B)
        d_in, d_out, rank, width, hidden, padded = sizes
        found = Networks(*(torch.empty_like(parameter) for parameter in parameters))
        blocks_A, blocks_B = triton.cdiv(d_in, _BLOCK), triton.cdiv(d_out, _BLOCK)
        parts = grad_A.new_empty(blocks_A + blocks_B, padded["R"], padded["H"])
        with on_device(grad_A):
            kernels.generate_outer_gradient_kernel[(blocks_A + blocks_B,)](
                *parameters, grad_A.contiguous(), grad_B.contiguous(), found.w2_A, found.w2_B, parts,
                d_in, d_out, rank, width, hidden, slope, blocks_A, **padded, BLOCK=_BLOCK,
            )  # fmt: skip
            # PyTorch adds the blocks' parts faster than the two programs of the next kernel would.
            kernels.generate_inner_gradient_kernel[(2,)](
                parameters.embedding_A, parameters.w1_A, parameters.embedding_B, parameters.w1_B,
                parts[:blocks_A].sum(0), parts[blocks_A:].sum(0),
                found.embedding_A, found.w1_A, found.embedding_B, found.w1_B,
                rank, width, hidden, slope, **padded,
            )  # fmt: skip
        return found

    def assemble(
        self,
        product: Tensor,
        A: Tensor,
        B: Tensor,
        squared_norm: Tensor,
        magnitude: Tensor,
        tau: Tensor,
        scaling: float,
        weight: Tensor | None,
        dtype: torch.dtype,
    ) -> Assembled:
        d_out, rank = B.shape
        A, B = A.contiguous(), B.contiguous()
        gram = self.product(A, A.T)
        whole = rank <= 64
        if not whole:
            gram = B @ gram
        norm, scale = torch.empty_like(squared_norm), torch.empty_like(squared_norm)
        scaled_B = torch.empty_like(B, dtype=dtype)
        product = product.contiguous()
        block_d, block_r = 32, _rank_block(rank, 64)
        strides = (0, 0) if weight is None else weight.stride()
        with on_device(B):
            kernels.assemble_kernel[(triton.cdiv(d_out, block_d),)](
                product, gram, B, squared_norm, magnitude, tau, product if weight is None else weight, A,
                norm, scale, scaled_B, d_out, rank, A.shape[1], *strides, scaling, functional.CANCELLATION_THRESHOLD,
                TAU_PER_ROW=tau.numel() > 1, REPAIR=weight is not None, WHOLE_RANK=whole,
                BLOCK_D=block_d, BLOCK_R=block_r, BLOCK_K=64,
            )  # fmt: skip
        return Assembled(product, norm, scale, scaled_B)

    def expand(
        self,
        base_output: Tensor,
        hidden: Tensor,
        scaled_B: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        inplace: bool,
    ) -> Tensor:
        if not inplace:
            base_output = base_output.contiguous()
        (tokens, d_out), rank = base_output.shape, scaled_B.shape[1]
        y = base_output if inplace else torch.empty_like(base_output)
        block_t, block_d = 64, 128
        with on_device(y):
            kernels.expand_kernel[(triton.cdiv(d_out, block_d), triton.cdiv(tokens, block_t))](
                base_output, hidden.contiguous(), scaled_B, scale, scale if bias is None else bias, y,
                tokens, d_out, rank, HAS_BIAS=bias is not None, PRECISION=dot_precision(hidden), WIDEN=interpreting(),
                BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_R=_rank_block(rank, 64),
            )  # fmt: skip
        return y

    def scale_gradient(self, grad: Tensor, kept: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, d_out = grad.shape
        parts, rows = _parts(tokens)
        scaled = torch.empty_like(grad)
        sums = torch.empty(parts, d_out, dtype=scale.dtype, device=grad.device)
        block_t, block_d = 64, 128
        with on_device(grad):
            kernels.scale_gradient_kernel[(triton.cdiv(d_out, block_d), parts)](
                grad, kept.contiguous(), scale, scale if bias is None else bias, scaled, sums, tokens, d_out, rows,
                HAS_BIAS=bias is not None, BLOCK_T=block_t, BLOCK_D=block_d,
            )  # fmt: skip
        return scaled, sums

    def finish(
        self,
        sums: Tensor,
        factor_grad: Tensor,
        assembled: Assembled,
        B: Tensor,
        magnitude: Tensor,
        tau: Tensor,
        scaling: float,
        product_dtype: torch.dtype,
        source: Source | None,
        *,
        detach_norm: bool,
    ) -> Finished:
        d_out, rank = B.shape
        B = B.contiguous()
        norm, scale = assembled.norm, assembled.scale
        grad_B, grad_magnitude, grad_tau = torch.empty_like(B), torch.empty_like(norm), torch.empty_like(norm)
        grad_product = None if detach_norm else torch.empty_like(B, dtype=product_dtype)
        grad_gram = None if detach_norm else torch.empty_like(assembled.scaled_B)
        # A pointer that the kernel does not follow may be any; this one is at hand.
        grad, x, weight = (B, B, B) if source is None else source[:3]
        block_d = 32
        with on_device(B):
            kernels.finish_kernel[(triton.cdiv(d_out, block_d),)](
                sums, factor_grad.contiguous(), assembled.aligned, B, norm, scale, magnitude, tau, grad, x, weight,
                grad_B, B if grad_product is None else grad_product, B if grad_gram is None else grad_gram,
                grad_magnitude, grad_tau, grad.shape[0], d_out, x.shape[1], rank, sums.shape[0], scaling,
                0.0 if source is None else source.threshold, *x.stride(), *weight.stride(),
                TAU_PER_ROW=tau.numel() > 1, OF_OUTPUT=source is not None, DETACH=detach_norm,
                PRECISION=dot_precision(x), WIDEN=interpreting(),
                PARTS=_PARTS, BLOCK_D=block_d, BLOCK_R=_rank_block(rank, 64), BLOCK_T=64, BLOCK_K=64,
            )  # fmt: skip
        return Finished(grad_B, grad_product, grad_gram, grad_magnitude, grad_tau)


def _parts(tokens: int) -> tuple[int, int]:
    """How many parts the tokens are cut into, and their size."""
    rows = triton.cdiv(tokens, _PARTS)
    return triton.cdiv(tokens, rows), rows


def _network_sizes(parameters: Networks) -> tuple[int, int, int, int, int, dict[str, int]] | None:
    """``(d_in, d_out, rank, e, h)`` and the kernels' padded sizes; None if the networks are too large for them."""
    rank, width = parameters.embedding_A.shape
    hidden = parameters.w1_A.shape[0]
    if rank > _MOST_RANK or hidden > _MOST_RANK or width > _MOST_WIDTH or parameters.w2_A.dtype != torch.float32:
        return None
    padded = {name: max(16, triton.next_power_of_2(size)) for name, size in (("R", rank), ("E", width), ("H", hidden))}
    return parameters.w2_A.shape[0], parameters.w2_B.shape[0], rank, width, hidden, padded
