"""The passes of passes.py on a GPU, one Triton kernel each."""

from __future__ import annotations

import torch
from torch import Tensor

from doran_core import functional
from doran_core.kernels import triton_kernels as kernels
from doran_core.kernels import triton_networks as network_kernels
from doran_core.kernels.backend import interpreting
from doran_core.kernels.launch import launch
from doran_core.kernels.networks import MOST_RANK, Networks, fit_kernels
from doran_core.kernels.passes import Assembled, Finished, Source, TorchPasses

__all__ = ["TritonPasses", "cdiv", "dot_precision", "padded", "parts_of_sums"]

_BLOCK = 64
"""Columns of A or rows of B in a block."""

_INTERPRETING = interpreting()
_HALF = (torch.bfloat16, torch.float16)
_PROGRAMS = 264
"""Programs that a pass over W0 is cut into, at least: two for each multiprocessor of a large GPU."""

MOST_PARTS = 64
"""Of the sums over tokens."""


def dot_precision(tensor: Tensor) -> str:
    """float32 products follow PyTorch's own switch for tf32; half precision has no choice."""
    return "tf32" if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


# Triton's own functions of these names take several microseconds.
def cdiv(size: int, block: int) -> int:
    return -(-size // block)


def padded(size: int) -> int:
    """The next power of 2, and at least what a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def parts_of_sums(d_out: int) -> int:
    """Parts that the sums over tokens of a layer are cut into: enough programs for a GPU, and little to keep."""
    return max(8, min(MOST_PARTS, 1024 // cdiv(d_out, 128)))


def _rank_block(rank: int, most: int) -> int:
    return min(most, padded(rank))


class TritonPasses(TorchPasses):
    """float32, bfloat16 and float16 on a CUDA device, or anywhere under TRITON_INTERPRET=1."""

    def generate(self, parameters: Networks, slope: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sizes = _network_sizes(parameters)
        if sizes is None:
            return super().generate(parameters, slope, dtype)
        d_in, d_out, rank, width, hidden, blocks = sizes
        A = torch.empty(rank, d_in, dtype=dtype, device=parameters.w2_A.device)
        B = torch.empty(d_out, rank, dtype=torch.float32, device=A.device)
        blocks_A, blocks_B = cdiv(d_in, _BLOCK), cdiv(d_out, _BLOCK)
        launch(
            network_kernels.generate_kernel, (blocks_A + blocks_B,), (*parameters, A, B),
            (d_in, d_out, rank, width, hidden, slope, blocks_A), **blocks, BLOCK=_BLOCK,
        )  # fmt: skip
        return A, B

    def generate_gradients(self, parameters: Networks, slope: float, grad_A: Tensor, grad_B: Tensor) -> Networks:
        sizes = _network_sizes(parameters)
        if sizes is None:
            return super().generate_gradients(parameters, slope, grad_A, grad_B)
        d_in, d_out, rank, width, hidden, blocks = sizes
        found = Networks(*(torch.empty_like(parameter) for parameter in parameters))
        blocks_A, blocks_B = cdiv(d_in, _BLOCK), cdiv(d_out, _BLOCK)
        parts = grad_A.new_empty(blocks_A + blocks_B, blocks["R"], blocks["H"])
        sizes_and_slope = (rank, width, hidden, slope)
        launch(
            network_kernels.generate_outer_gradient_kernel, (blocks_A + blocks_B,),
            (*parameters, grad_A.contiguous(), grad_B.contiguous(), found.w2_A, found.w2_B, parts),
            (d_in, d_out, *sizes_and_slope, blocks_A, grad_A.shape[0]), **blocks, BLOCK=_BLOCK,
        )  # fmt: skip
        launch(
            network_kernels.generate_inner_gradient_kernel, (2,),
            (parameters.embedding_A, parameters.w1_A, parameters.embedding_B, parameters.w1_B, parts,
             found.embedding_A, found.w1_A, found.embedding_B, found.w1_B),
            (*sizes_and_slope, blocks_A, blocks_B),
            **blocks, AT_ONCE=max(1, 16384 // (blocks["R"] * blocks["H"])), num_warps=8,
        )  # fmt: skip
        return found

    def assemble(
        self,
        weight: Tensor | None,
        product: Tensor | None,
        A: Tensor,
        B: Tensor,
        squared_norm: Tensor,
        magnitude: Tensor,
        tau: Tensor,
        scaling: float,
        dtype: torch.dtype,
        *,
        repair: bool,
    ) -> Assembled:
        (d_out, rank), d_in = B.shape, A.shape[1]
        A, B = A.contiguous(), B.contiguous()
        norm, scale = torch.empty_like(squared_norm), torch.empty_like(squared_norm)
        scaled_B = torch.empty_like(B, dtype=dtype)
        whole = product is None and _one_block(weight, A)
        if whole:
            aligned = torch.empty_like(B)
        elif product is None:
            assert weight is not None
            aligned = self.product(weight, A.T)
        else:
            aligned = product.contiguous()
        base = aligned if weight is None else weight  # a pointer that a kernel does not follow may be any
        block_d = 32
        grid = (cdiv(d_out, block_d),)
        sizes = (d_out, rank, d_in, *base.stride(), scaling, functional.CANCELLATION_THRESHOLD)
        flags = {"TAU_PER_ROW": tau.numel() > 1, "REPAIR": repair, "BLOCK_D": block_d}
        if whole:
            launch(
                kernels.assemble_whole_kernel, grid,
                (base, A, B, squared_norm, magnitude, tau, aligned, norm, scale, scaled_B), sizes, **flags,
                PRECISION=dot_precision(A), WIDEN=_INTERPRETING, BLOCK_R=_rank_block(rank, MOST_RANK),
                BLOCK_K=128, num_stages=4,
            )  # fmt: skip
        else:
            gram = B @ self.product(A, A.T)
            launch(
                kernels.assemble_kernel, grid,
                (aligned, gram, B, squared_norm, magnitude, tau, base, A, norm, scale, scaled_B), sizes, **flags,
                BLOCK_R=_rank_block(rank, 64), BLOCK_K=64,
            )  # fmt: skip
        return Assembled(aligned, norm, scale, scaled_B)

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
        tokens, (d_out, rank) = hidden.shape[0], scaled_B.shape
        y = base_output if inplace else torch.empty_like(base_output)
        block_t, block_d = 64, 128
        launch(
            kernels.expand_kernel, (cdiv(d_out, block_d), cdiv(tokens, block_t)),
            (base_output, hidden.contiguous(), scaled_B, scale, scale if bias is None else bias, y),
            (tokens, d_out, rank), HAS_BIAS=bias is not None, PRECISION=dot_precision(hidden), WIDEN=_INTERPRETING,
            BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_R=_rank_block(rank, 64),
        )  # fmt: skip
        return y

    def scale_gradient(self, grad: Tensor, kept: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, d_out = grad.shape
        parts = parts_of_sums(d_out)
        sums, scaled = scale.new_empty(parts, d_out), torch.empty_like(grad)
        block_t, block_d = 64, 64
        launch(
            kernels.scale_gradient_kernel, (cdiv(d_out, block_d), parts),
            (grad, kept.contiguous(), scale, scale if bias is None else bias, scaled, sums),
            (tokens, d_out, cdiv(tokens, parts)), HAS_BIAS=bias is not None, BLOCK_T=block_t, BLOCK_D=block_d,
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
        raw_tau: Tensor | None,
        *,
        detach_norm: bool,
    ) -> Finished:
        d_out, rank = B.shape
        B = B.contiguous()
        norm, scale = assembled.norm, assembled.scale
        grad_B, grad_magnitude, grad_tau = torch.empty_like(B), torch.empty_like(norm), torch.empty_like(norm)
        grad_product = None if detach_norm else torch.empty_like(B, dtype=product_dtype)
        # A pointer that the kernel does not follow may be any; this one is at hand.
        grad, x, weight = (B, B, B) if source is None else source[:3]
        block_d = 32
        launch(
            kernels.finish_kernel, (cdiv(d_out, block_d),),
            (sums, factor_grad.contiguous(), assembled.aligned, B, norm, scale, magnitude, tau,
             tau if raw_tau is None else raw_tau, grad, x, weight,
             grad_B, B if grad_product is None else grad_product, grad_magnitude, grad_tau),
            (grad.shape[0], d_out, x.shape[1], rank, sums.shape[0], 1 if raw_tau is None else d_out // raw_tau.numel(),
             scaling, 0.0 if source is None else source.threshold, *x.stride(), *weight.stride()),
            TAU_PER_ROW=tau.numel() > 1, RAW_TAU=raw_tau is not None, OF_OUTPUT=source is not None, DETACH=detach_norm,
            PRECISION=dot_precision(x), WIDEN=_INTERPRETING,
            PARTS=MOST_PARTS, BLOCK_D=block_d, BLOCK_R=_rank_block(rank, 64), BLOCK_T=64, BLOCK_K=64,
        )  # fmt: skip
        return Finished(grad_B, grad_product, grad_magnitude, grad_tau)

    def gradient_of_A(
        self,
        grad_hidden: Tensor,
        x: Tensor,
        product_grad: Tensor | None,
        weight: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> Tensor:
        if not _one_block(weight, A) or x.dtype != A.dtype:
            return super().gradient_of_A(grad_hidden, x, product_grad, weight, A, B, scaling)
        assert weight is not None
        (tokens, d_in), (d_out, rank) = x.shape, B.shape
        block_t, block_k = 64, 64
        blocks = cdiv(d_in, block_k)
        parts = max(1, min(8, cdiv(_PROGRAMS, blocks)))
        total = torch.empty(parts, rank, d_in, dtype=torch.float32, device=x.device)
        launch(
            kernels.gradient_of_A_kernel, (blocks, parts),
            (grad_hidden.contiguous(), x, A if product_grad is None else product_grad, weight, B.contiguous(),
             A.contiguous(), total),
            (tokens, d_out, d_in, rank, cdiv(tokens, parts), cdiv(d_out, parts),
             *x.stride(), *weight.stride(), scaling),
            DETACH=product_grad is None, PRECISION=dot_precision(A), WIDEN=_INTERPRETING,
            BLOCK_T=block_t, BLOCK_R=_rank_block(rank, MOST_RANK), BLOCK_K=block_k, num_stages=4,
        )  # fmt: skip
        return total


def _one_block(weight: Tensor | None, A: Tensor) -> bool:
    """Whether the kernels that read W0 themselves take these: half precision, and a rank that is one block."""
    return weight is not None and weight.dtype in _HALF and A.dtype == weight.dtype and A.shape[0] <= MOST_RANK


def _network_sizes(parameters: Networks) -> tuple[int, int, int, int, int, dict[str, int]] | None:
    """``(d_in, d_out, rank, e, h)`` and the kernels' padded sizes; None if the networks are too large for them."""
    rank, width = parameters.embedding_A.shape
    hidden = parameters.w1_A.shape[0]
    if not fit_kernels(rank, hidden, width) or parameters.w2_A.dtype != torch.float32:
        return None
    blocks = {"R": padded(rank), "E": padded(width), "H": padded(hidden)}
    return parameters.w2_A.shape[0], parameters.w2_B.shape[0], rank, width, hidden, blocks
