"""Weight sides of larger ranks: the library's products with W0, and Triton's for factors that lie here and there.

For layers in bfloat16 the networks' products are taken in tf32, and those of their gradients in bfloat16, as a LoRA's
are; float16 has tf32's precision itself, and there tf32 is taken three times, for float32's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core import functional
from doran_core.kernels.backend import interpreting
from doran_core.kernels.family import Arrived, Family, Kept, Row, Shape
from doran_core.kernels.launch import launch
from doran_core.kernels.passes import narrow_on_cuda
from doran_core.kernels.triton_fleet import COLUMNS
from doran_core.kernels.triton_passes import cdiv, dot_precision
from doran_core.kernels.triton_wide import assemble_wide_kernel, layer_product_kernel

__all__ = ["WideFamily"]


class _Operand(NamedTuple):
    """A matrix of each layer.

    Attributes:
        tensor: ``[layers, rows, columns]`` of any strides. With a column only its sizes and strides count.
        table: of addresses, ``[layers, columns]``.
        column: where the table has those of the matrix.
    """

    tensor: Tensor
    table: Tensor | None = None
    column: int = -1

    @property
    def followed(self) -> Tensor:
        """The table, as the kernel takes it: a pointer that it does not follow may be any."""
        return self.tensor if self.table is None else self.table

    @property
    def width(self) -> int:
        """Columns of the table."""
        return 0 if self.table is None else self.table.shape[1]

    @property
    def T(self) -> _Operand:
        """The transposed matrices."""
        return self._replace(tensor=self.tensor.transpose(1, 2))


def _product(
    left: _Operand, right: _Operand, out: _Operand, precision: str, *, alpha: float = 1.0, add: bool = False
) -> None:
    """``out = alpha left @ right`` for each layer, or added to it."""
    layers, m, k = left.tensor.shape
    n = right.tensor.shape[2]
    block = 128 if precision in ("tf32", "bf16") else 64
    launch(
        layer_product_kernel, (cdiv(m, block) * cdiv(n, block), layers),
        (left.tensor, left.followed, right.tensor, right.followed, out.tensor, out.followed),
        (m, n, k, alpha, *left.tensor.stride(), *right.tensor.stride(), *out.tensor.stride()),
        LEFT=left.column, LEFT_WIDTH=left.width, RIGHT=right.column, RIGHT_WIDTH=right.width,
        OUT=out.column, OUT_WIDTH=out.width, ADD=add, PRECISION=precision,
        BLOCK_M=block, BLOCK_N=block, BLOCK_K=32, num_warps=8, num_stages=3,
    )  # fmt: skip


class WideFamily(Family):
    """A family of any sizes."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__(rows)
        of_user = {user: network for network, users in enumerate(self.networks.users) for user in users}
        self._networks_of = [
            [torch.tensor([of_user[2 * m + factor] for m in shape.members], device=self.device) for factor in (0, 1)]
            for shape in self.shapes
        ]
        every = torch.arange(len(self.networks.pairs), device=self.device)[:, None]
        self._chosen = [[(of == every).float() for of in factors] for factors in self._networks_of]
        self._precision, self._gradient_precision = _precisions(rows[0].weight)

    def _features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all networks: ``F [networks, r, h]``, the embeddings and the W1."""
        embeddings, firsts = (
            torch.stack([p.detach() for p in kind]) for kind in zip(*self.networks.pairs, strict=True)
        )
        before = torch.bmm(embeddings, firsts.mT)
        return F.leaky_relu_(before, self.slope).mul_(self._feature_scale), embeddings, firsts

    @property
    def _feature_scale(self) -> float:
        return 1.0 / (self.hidden * math.sqrt(self.width))

    def _features_of(self, shape: Shape) -> tuple[_Operand, _Operand]:
        """A's and B's of each layer, ``[layers, r, h]``."""
        features = self._features()[0]
        of_A, of_B = self._networks_of[shape.number]
        return _Operand(features[of_A]), _Operand(features[of_B])

    def values(self, shape: Shape) -> tuple[Kept, Tensor, Tensor]:
        row, count = shape.row, len(shape.members)
        d_out, d_in, rank = shape.sizes
        features_A, features_B = self._features_of(shape)
        A = row.weight.new_empty(count, rank, d_in)
        B = row.weight.new_empty(count, d_out, rank, dtype=torch.float32)
        _product(features_A, _own(shape, "w2_A").T, _Operand(A), self._precision)
        _product(_own(shape, "w2_B"), features_B.T, _Operand(B), self._precision)
        aligned, along = torch.empty_like(B), torch.empty_like(B)
        for index, member in enumerate(shape.members):
            _multiply(self.rows[member].weight, A[index].T, aligned[index])
        _product(_Operand(B), _Operand(_gram(A)).T, _Operand(along), self._precision)  # which is symmetric
        tau = self.tau(shape)
        scaled_B = torch.empty_like(B, dtype=A.dtype)
        norm, scale = B.new_empty(count, d_out), B.new_empty(count, d_out)
        block_d = 32
        least = B.new_empty(count, cdiv(d_out, block_d))
        launch(
            assemble_wide_kernel, (least.shape[1], count),
            (shape.table, aligned, along, A, B, tau, norm, scale, scaled_B, least),
            (d_out, rank, d_in, row.scaling, functional.CANCELLATION_THRESHOLD),
            TAU_PER_ROW=tau.shape[1] > 1, REPAIR=row.repair, BLOCK_D=block_d, BLOCK_R=64, BLOCK_K=64,
        )  # fmt: skip
        return Kept(A, B, aligned, norm, scale, tau), scaled_B, least

    def new_features(self) -> Tensor:
        return torch.zeros(len(self.networks.pairs), self.rank * self.hidden, device=self.device)

    def outer_gradients(self, shape: Shape, kept: Kept, arrived: Arrived, features: Tensor) -> tuple[Tensor, Tensor]:
        (d_out, d_in, rank), count = shape.sizes, len(shape.members)
        features_A, features_B = self._features_of(shape)
        like_A = arrived.sent[0].for_A[None].expand(count, rank, d_in)
        grad_A, grad_B = _Operand(like_A, arrived.addresses, 0), _Operand(arrived.grad_B)
        if not shape.row.detach_norm:
            for member, sent, M in zip(shape.members, arrived.sent, arrived.grad_product.unbind(), strict=True):
                if sent.graph_task >= 0:  # what was sent is this backward's own, and may be added to
                    _multiply(M.T, self.rows[member].weight, sent.for_A, add=True)
            mixed = torch.bmm(arrived.grad_product.mT, kept.B.to(kept.A.dtype))
            _product(
                _Operand(mixed), _Operand(kept.A), grad_A, self._gradient_precision, alpha=shape.row.scaling, add=True
            )
        grad_w2_A = arrived.grad_B.new_empty(count, d_in, self.hidden)
        grad_w2_B = arrived.grad_B.new_empty(count, d_out, self.hidden)
        _product(grad_A.T, features_A, _Operand(grad_w2_A), self._gradient_precision)
        _product(grad_B, features_B, _Operand(grad_w2_B), self._gradient_precision)
        parts = arrived.grad_B.new_empty(count, rank, self.hidden)
        _product(grad_A, _own(shape, "w2_A"), _Operand(parts), self._gradient_precision)
        self._add(features, shape, 0, parts)
        _product(grad_B.T, _own(shape, "w2_B"), _Operand(parts), self._gradient_precision)
        self._add(features, shape, 1, parts)
        return grad_w2_A, grad_w2_B

    def _add(self, features: Tensor, shape: Shape, factor: int, parts: Tensor) -> None:
        """Add the layers' parts to their networks', in one order: an indexed addition has none on a GPU."""
        features.addmm_(self._chosen[shape.number][factor], parts.flatten(1))

    def inner_gradients(self, features: Tensor) -> tuple[Tensor, Tensor]:
        values, embeddings, firsts = self._features()
        inner = torch.ops.aten.leaky_relu_backward(features.view_as(values), values, self.slope, False)
        inner.mul_(self._feature_scale)
        return torch.bmm(inner, firsts), torch.bmm(inner.mT, embeddings)


def _precisions(weight: Tensor) -> tuple[str, str]:
    """Of the products of the networks, and of those of their gradients."""
    if weight.dtype == torch.float32:
        return dot_precision(weight), dot_precision(weight)
    if weight.dtype == torch.float16 or interpreting():
        return ("ieee", "ieee") if interpreting() else ("tf32x3", "tf32x3")
    return "tf32", "bf16"


def _own(shape: Shape, name: str) -> _Operand:
    """The layers' ``w2_A [d_in, h]`` or ``w2_B [d_out, h]``."""
    matrix: Tensor = getattr(shape.row.networks, name).detach()
    return _Operand(matrix[None].expand(len(shape.members), *matrix.shape), shape.table, COLUMNS.index(name))


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``left @ right`` into ``out``, float32, or added to it."""
    if not narrow_on_cuda(left):
        product = left.to(out.dtype) @ right.to(out.dtype)
        out.copy_(out + product if add else product)
    elif add:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)


def _gram(A: Tensor) -> Tensor:
    """``A A^T`` of each layer, float32."""
    return torch.bmm(A, A.mT, out_dtype=torch.float32) if narrow_on_cuda(A) else torch.bmm(A.float(), A.float().mT)
