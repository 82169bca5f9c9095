"""The passes of passes.py on a GPU, one Triton kernel each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from doran_core import functional
from doran_core.kernels import triton_kernels as kernels
from doran_core.kernels.backend import interpreting
from doran_core.kernels.passes import Shape, TorchPasses
from doran_core.support.torch_internals import direct_launch as launch

__all__ = ["TritonPasses"]

_HALF = (torch.bfloat16, torch.float16)
_ONE_BLOCK = 64
"""Ranks up to this are one block of a kernel."""
_MOST_PARTS = 64
_ROWS_PER_PART = 4096
"""Rows of W0 that a program of ``M^T W0`` goes through."""
_INTERPRETING = interpreting()


def _precision(tensor: Tensor) -> str:
    """float32 products follow PyTorch's own switch for tf32; half precision has no choice."""
    return "tf32" if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


# Triton's own functions of these names take several microseconds.
def _cdiv(size: int, block: int) -> int:
    return -(-size // block)


def _padded(size: int) -> int:
    """The next power of 2, and at least what a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


class TritonPasses(TorchPasses):
    """float32, bfloat16 and float16 on a CUDA device, or anywhere under TRITON_INTERPRET=1."""

    def sum_parts(self, d_out: int) -> int:
        return max(8, min(_MOST_PARTS, 1024 // _cdiv(d_out, 128)))  # enough programs for a GPU, and little to keep

    def expand(
        self, base_output: Tensor, hidden: Tensor, B: Tensor, scale: Tensor, bias: Tensor | None, *, inplace: bool
    ) -> Tensor:
        if not inplace:
            base_output = base_output.contiguous()
        tokens, (d_out, rank) = hidden.shape[0], B.shape
        y = base_output if inplace else torch.empty_like(base_output)
        block_t, block_d = 64, 128
        launch(
            kernels.expand_kernel, (_cdiv(d_out, block_d), _cdiv(tokens, block_t)),
            (base_output, hidden, B, scale, scale if bias is None else bias, y),
            (tokens, d_out, rank), HAS_BIAS=bias is not None, PRECISION=_precision(hidden), WIDEN=_INTERPRETING,
            BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_R=min(64, _padded(rank)),
        )  # fmt: skip
        return y

    def scale_gradient(
        self, grad: Tensor, kept: Tensor, scale: Tensor, bias: Tensor | None, *, is_output: bool
    ) -> tuple[Tensor, Tensor]:
        tokens, d_out = grad.shape
        parts = self.sum_parts(d_out)
        sums, scaled = scale.new_empty(parts, d_out), torch.empty_like(grad)
        block_t, block_d = 64, 64
        launch(
            kernels.scale_gradient_kernel, (_cdiv(d_out, block_d), parts),
            (grad, kept.contiguous(), scale, scale if bias is None else bias, scaled, sums),
            (tokens, d_out, _cdiv(tokens, parts)),
            HAS_BIAS=bias is not None, IS_OUTPUT=is_output, BLOCK_T=block_t, BLOCK_D=block_d,
        )  # fmt: skip
        return scaled, sums

    def row_scales(
        self, shape: Shape, U: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, tau: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        layers, d_out, rank = B.shape
        table = _addresses(shape.weights, rank)
        if table is None:
            return super().row_scales(shape, U, A, B, magnitude, tau)
        K, norm, scale = torch.empty_like(B), torch.empty_like(magnitude), torch.empty_like(magnitude)
        block_d, block_r = 64, _padded(rank)
        launch(
            kernels.row_scales_kernel, (_cdiv(d_out, block_d), layers),
            (table, A, B, shape.squared_norm, magnitude, tau, K, norm, scale),
            (d_out, rank, A.shape[2], *shape.weights[0].stride(), shape.scaling, functional.CANCELLATION_THRESHOLD),
            TAU_PER_ROW=tau.shape[1] > 1, REPAIR=shape.repair, WIDEN=_INTERPRETING,
            BLOCK_D=block_d, BLOCK_R=block_r, BLOCK_K=128,
            num_stages=4 if block_r <= 32 else 3,  # more does not fit into the shared memory of consumer GPUs
        )  # fmt: skip
        return K, norm, scale

    def add_weight_products(self, shape: Shape, total: Tensor, left: Tensor) -> None:
        layers, d_out, rank = left.shape
        table = _addresses(shape.weights, rank)
        if table is None:
            super().add_weight_products(shape, total, left)
            return
        d_in, parts, block_k = total.shape[2], _cdiv(d_out, _ROWS_PER_PART), 128
        products = total.new_empty(layers, parts, rank, d_in)
        launch(
            kernels.weight_product_kernel, (_cdiv(d_in, block_k), parts, layers), (table, left, products),
            (d_out, d_in, rank, _cdiv(d_out, parts), *shape.weights[0].stride()),
            WIDEN=_INTERPRETING, BLOCK_T=64, BLOCK_R=_padded(rank), BLOCK_K=block_k, num_stages=4,
        )  # fmt: skip
        total.add_(products[:, 0] if parts == 1 else products.sum(1))

    def expert_rows(self, base_output: Tensor, delta: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
        base_output, y = base_output.contiguous(), torch.empty_like(base_output, memory_format=torch.contiguous_format)
        self._launch_by_expert(kernels.expert_rows_kernel, (base_output, delta.contiguous(), scale, ends, y), scale)
        return y

    def expert_rows_gradient(
        self, grad: Tensor, base_output: Tensor, scale: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad, base_output = grad.contiguous(), base_output.contiguous()
        sums, scaled = scale.new_empty(_parts(scale), *scale.shape), torch.empty_like(base_output)
        self._launch_by_expert(
            kernels.expert_rows_gradient_kernel, (grad, base_output, scale, ends, scaled, sums), scale
        )
        return scaled, sums[0] if len(sums) == 1 else sums.sum(0)

    def _launch_by_expert(self, kernel: Any, tensors: tuple[Tensor, ...], scale: Tensor) -> None:
        experts, d_out = scale.shape
        block = 64
        grid = _cdiv(d_out, block), experts, _parts(scale)
        launch(kernel, grid, tensors, (len(tensors[0]), d_out), BLOCK_T=block, BLOCK_D=block)


def _addresses(weights: Sequence[Tensor], rank: int) -> Tensor | None:
    """Where the W0 lie now, as a tensor; None if there are none, or the kernels of weight sides do not take them.

    FSDP2 frees a weight after the forward pass, and gathers it for the backward pass somewhere else.
    """
    if not weights or weights[0].dtype not in _HALF or rank > _ONE_BLOCK:
        return None
    return _table(weights[0].device, tuple(map(Tensor.data_ptr, weights)))


@functools.lru_cache(maxsize=4096)
def _table(device: torch.device, addresses: tuple[int, ...]) -> Tensor | None:
    """Addresses as a tensor on the device, without waiting for it; None if one is not aligned."""
    if any(address % 16 for address in addresses) or not all(addresses):
        return None
    table = torch.tensor(addresses, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _parts(scale: Tensor) -> int:
    """In how many parts an expert's rows are computed: enough programs for a GPU with few experts, too."""
    return max(1, 128 // len(scale))
