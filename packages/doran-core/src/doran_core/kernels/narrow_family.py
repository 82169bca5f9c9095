"""Weight sides whose rank and hidden layers are one block of a kernel: few launches, each for all layers of a shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from doran_core import functional
from doran_core.kernels.backend import interpreting
from doran_core.kernels.family import Arrived, Family, Kept, Row, Shape, address_table, upload
from doran_core.kernels.launch import launch
from doran_core.kernels.triton_fleet import (
    assemble_fleet_kernel,
    generate_fleet_kernel,
    inner_gradient_fleet_kernel,
    outer_gradient_fleet_kernel,
    weight_product_fleet_kernel,
)
from doran_core.kernels.triton_passes import cdiv, dot_precision, padded

__all__ = ["NarrowFamily"]

_BLOCK = 128
"""Columns of A or rows of B that a program of the networks' kernels has."""
_ROWS_PER_PART = 4096
"""Rows of W0 that one program of ``M^T W0`` goes through."""
_INTERPRETING = interpreting()


def _blocks(shape: Shape) -> tuple[int, int]:
    """Blocks of A and of B in a layer."""
    d_out, d_in, _ = shape.sizes
    return cdiv(d_in, _BLOCK), cdiv(d_out, _BLOCK)


class NarrowFamily(Family):
    """A family that :func:`~doran_core.kernels.networks.fit_kernels`."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__(rows)
        self._padded = {"R": padded(self.rank), "E": padded(self.width), "H": padded(self.hidden)}
        self._trunks = address_table(self.networks.pairs, self.device)
        self._number_blocks()

    def _number_blocks(self) -> None:
        """Which blocks of the gradient of the features are a shape's, and which a network's."""
        blocks: list[range] = [range(0)] * (2 * len(self.rows))
        self._first, count = [], 0
        for shape in self.shapes:
            self._first.append(count)
            for member in shape.members:
                for factor, length in enumerate(_blocks(shape)):
                    blocks[2 * member + factor] = range(count, count + length)
                    count += length
        of_networks = [[block for user in users for block in blocks[user]] for users in self.networks.users]
        ends = [0]
        for own in of_networks:
            ends.append(ends[-1] + len(own))
        self._count, self._most_blocks = count, max(map(len, of_networks))
        self._ranges = upload(ends, self.device)
        self._members = upload([block for own in of_networks for block in own], self.device)

    def values(self, shape: Shape) -> tuple[Kept, Tensor, Tensor]:
        row, count = shape.row, len(shape.members)
        d_out, d_in, rank = shape.sizes
        weight = row.weight
        A = weight.new_empty(count, rank, d_in)
        B = weight.new_empty(count, d_out, rank, dtype=torch.float32)
        blocks_A, blocks_B = _blocks(shape)
        launch(
            generate_fleet_kernel, (blocks_A + blocks_B, count), (shape.table, A, B),
            (d_in, d_out, rank, self.width, self.hidden, row.slope, blocks_A), **self._padded, BLOCK=_BLOCK,
        )  # fmt: skip
        tau = self.tau(shape)
        aligned, scaled_B = torch.empty_like(B), torch.empty_like(B, dtype=weight.dtype)
        norm, scale = B.new_empty(count, d_out), B.new_empty(count, d_out)
        block_d = 64
        least = B.new_empty(count, cdiv(d_out, block_d))
        launch(
            assemble_fleet_kernel, (least.shape[1], count),
            (shape.table, A, B, tau, aligned, norm, scale, scaled_B, least),
            (d_out, rank, d_in, row.scaling, functional.CANCELLATION_THRESHOLD),
            TAU_PER_ROW=tau.shape[1] > 1, REPAIR=row.repair, PRECISION=dot_precision(A), WIDEN=_INTERPRETING,
            BLOCK_D=block_d, BLOCK_R=padded(rank), BLOCK_K=128, num_stages=4,
        )  # fmt: skip
        return Kept(A, B, aligned, norm, scale, tau), scaled_B, least

    def new_features(self) -> Tensor:
        size = self._count, self._padded["R"], self._padded["H"]
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def outer_gradients(self, shape: Shape, kept: Kept, arrived: Arrived, features: Tensor) -> tuple[Tensor, Tensor]:
        A = kept.A
        row, (d_out, d_in, rank), count = shape.row, shape.sizes, len(shape.members)
        parts = 1
        through_norm = mixed = arrived.grad_B  # pointers that are not followed may be any
        if not row.detach_norm:
            parts = cdiv(d_out, _ROWS_PER_PART)
            through_norm = arrived.grad_B.new_empty(count, parts, rank, d_in)
            block_k = 128
            launch(
                weight_product_fleet_kernel, (cdiv(d_in, block_k), parts, count),
                (shape.table, arrived.grad_product, through_norm), (d_out, d_in, rank, cdiv(d_out, parts)),
                PRECISION=dot_precision(A), WIDEN=_INTERPRETING,
                BLOCK_T=64, BLOCK_R=padded(rank), BLOCK_K=block_k, num_stages=4,
            )  # fmt: skip
            mixed = torch.bmm(arrived.grad_product.transpose(1, 2), kept.B.to(A.dtype))
        grad_w2_A = arrived.grad_B.new_empty(count, d_in, self.hidden)
        grad_w2_B = arrived.grad_B.new_empty(count, d_out, self.hidden)
        blocks_A, blocks_B = _blocks(shape)
        launch(
            outer_gradient_fleet_kernel, (blocks_A + blocks_B, count),
            (shape.table, arrived.addresses, through_norm, mixed, A, arrived.grad_B, grad_w2_A, grad_w2_B,
             features[self._first[shape.number] :]),
            (d_in, d_out, rank, self.width, self.hidden, row.slope, blocks_A, parts, row.scaling),
            DETACH=row.detach_norm, **self._padded, BLOCK=_BLOCK,
        )  # fmt: skip
        return grad_w2_A, grad_w2_B

    def inner_gradients(self, features: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.networks.pairs)
        grad_embedding = features.new_empty(count, self.rank, self.width)
        grad_w1 = features.new_empty(count, self.hidden, self.width)
        launch(
            inner_gradient_fleet_kernel, (count,),
            (self._trunks, self._ranges, self._members, features, grad_embedding, grad_w1),
            (self._most_blocks, self.rank, self.width, self.hidden, self.slope),
            **self._padded, AT_ONCE=max(1, 16384 // (self._padded["R"] * self._padded["H"])), num_warps=8,
        )  # fmt: skip
        return grad_embedding, grad_w1
