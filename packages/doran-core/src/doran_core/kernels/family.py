"""Layers whose weight sides are computed together: their tensors, and what is common to all ways of computing them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core.kernels.launch import launch
from doran_core.kernels.networks import Networks
from doran_core.kernels.passes import small_scale
from doran_core.kernels.sides import (
    RECOMPUTED,
    RECOMPUTED_UNDER_HOOKS,
    Keepers,
    Part,
    Sent,
    Sides,
    Smallness,
    recomputed,
    together,
)
from doran_core.kernels.triton_fleet import COLUMNS, finish_fleet_kernel
from doran_core.kernels.triton_passes import cdiv, padded, parts_of_sums

__all__ = ["Arrived", "Family", "InnerNetworks", "Kept", "Row", "Shape", "address_table", "upload"]


class Row(NamedTuple):
    """A layer's tensors, in the order of a table's columns, and what else its weight side depends on."""

    networks: Networks
    magnitude: Tensor
    raw_tau: Tensor
    squared_norm: Tensor
    weight: Tensor
    has_bias: bool
    slope: float
    scaling: float
    detach_norm: bool
    repair: bool

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *options: Any) -> Row:
        """From its :attr:`tensors` and :attr:`options`."""
        own = len(Networks._fields)
        return cls._make((Networks._make(tensors[:own]), *tensors[own:], *options))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that kernels find through a table."""
        own: tuple[Any, ...] = self[1:_OPTIONS]
        return *self.networks, *own

    @property
    def options(self) -> tuple[Any, ...]:
        """What is no tensor."""
        return self[_OPTIONS:]

    @property
    def family(self) -> tuple[Any, ...]:
        """What the layers of one :class:`Family` have in common."""
        return (
            self.weight.device,
            self.weight.dtype,
            self.networks.embedding_A.shape,
            self.networks.w1_A.shape,
            self.slope,
        )

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the layers of one launch have in common besides."""
        return *self.weight.shape, self.scaling, self.raw_tau.numel(), self.detach_norm, self.repair


_OPTIONS = Row._fields.index("weight") + 1

assert Networks._fields + Row._fields[1:_OPTIONS] == COLUMNS


class Kept(NamedTuple):
    """What the backward of the layers of one shape needs; the first dimension is the layer."""

    A: Tensor
    B: Tensor
    aligned: Tensor
    norm: Tensor
    scale: Tensor
    tau: Tensor


def _is_distributed() -> bool:
    """Whether gradients are exchanged with other processes: then layers that were not used send zeros, and no None.

    A wrapper such as DistributedDataParallel takes all parameters of a family for used where one is.
    """
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def address_table(rows: Iterable[tuple[Tensor, ...]], device: torch.device) -> Tensor:
    """Where tensors are, ``[rows, columns]`` int64 on the device."""
    return upload([[tensor.data_ptr() for tensor in row] for row in rows], device)


def upload(numbers: Any, device: torch.device) -> Tensor:
    """Integers as a tensor on the device, without waiting for it."""
    host = torch.tensor(numbers, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@dataclass
class Shape:
    """The layers of one launch.

    Attributes:
        number: of the shape in the family.
        members: the layers' numbers there.
        row: of one of them.
        table: of the addresses of their tensors, ``[layers, columns]``.
        thresholds: below which their ``|c|`` is too near 0, see :func:`~doran_core.kernels.passes.small_scale`.
    """

    number: int
    members: list[int]
    row: Row
    table: Tensor
    thresholds: list[float]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``(d_out, d_in, r)``."""
        return *self.row.weight.shape, self.row.networks.embedding_A.shape[0]


class InnerNetworks:
    """The distinct inner networks of a family: an embedding and a W1 each.

    Attributes:
        pairs: their parameters.
        users: of each, the layers, for each factor apart: ``2 * layer`` for A and ``2 * layer + 1`` for B.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        users: dict[tuple[int, int], list[int]] = {}
        for layer, row in enumerate(rows):
            of = row.networks
            for factor, pair in enumerate(((of.embedding_A, of.w1_A), (of.embedding_B, of.w1_B))):
                key = id(pair[0]), id(pair[1])
                pairs[key] = pair
                users.setdefault(key, []).append(2 * layer + factor)
        self.pairs = list(pairs.values())
        self.users = list(users.values())


class Arrived(NamedTuple):
    """What the layers of one shape sent.

    Attributes:
        addresses: ``[layers, 4]``, see :func:`~doran_core.kernels.triton_fleet.finish_fleet_kernel`.
        sent: by each layer; zeros by those that were not used.
        grad_B: ``[layers, d_out, r]`` float32.
        grad_product: ``M``, ``[layers, d_out, r]`` in the layers' dtype; anything if the norm is detached.
    """

    addresses: Tensor
    sent: list[Sent]
    grad_B: Tensor
    grad_product: Tensor


class Family(ABC):
    """Layers whose weight sides have the same networks, and how they are computed.

    Args:
        rows: the layers; all of one :attr:`Row.family`.

    Attributes:
        parameters: the networks' embeddings and first layers, then W2_A, W2_B, magnitude and raw tau of each layer.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.device = rows[0].weight.device
        self.rank, self.width = rows[0].networks.embedding_A.shape
        self.hidden = rows[0].networks.w1_A.shape[0]
        self.slope = rows[0].slope
        grouped: dict[tuple[Any, ...], list[int]] = {}
        for index, each in enumerate(rows):
            grouped.setdefault(each.shape, []).append(index)
        self.shapes: list[Shape] = []
        for members in grouped.values():
            bounds = [small_scale(rows[i].weight.dtype, has_bias=rows[i].has_bias) for i in members]
            table = address_table((rows[i].tensors for i in members), self.device)
            self.shapes.append(Shape(len(self.shapes), members, rows[members[0]], table, bounds))
        self.networks = InnerNetworks(rows)
        inner = [tensor for pair in self.networks.pairs for tensor in pair]
        self.parameters = inner + [
            tensor for row in rows for tensor in (row.networks.w2_A, row.networks.w2_B, row.magnitude, row.raw_tau)
        ]
        self._sizes = [row.weight.shape for row in rows]
        nobody = [False] * len(rows)
        self._recomputed = recomputed(self._sizes, RECOMPUTED, nobody)
        self._recomputed_under_hooks = recomputed(self._sizes, RECOMPUTED_UNDER_HOOKS, nobody)
        self._knows_keepers = False
        places = {m: (shape.number, index) for shape in self.shapes for index, m in enumerate(shape.members)}
        self._places = [places[layer] for layer in range(len(rows))]
        self._addresses = self.addresses()

    def _hear(self, kept_anyway: list[bool]) -> None:
        """What :class:`~doran_core.kernels.sides.Keepers` found."""
        self._knows_keepers = True
        self._recomputed = recomputed(self._sizes, RECOMPUTED, kept_anyway)

    def addresses(self) -> list[int]:
        """Where all tensors of all layers are now."""
        return [tensor.data_ptr() for row in self.rows for tensor in row.tensors]

    def up_to_date(self) -> Family:
        """Itself, or one made anew if tensors were moved (``tensor.data = ...``) since its tables were made."""
        return self if self.addresses() == self._addresses else type(self)(self.rows)

    @abstractmethod
    def values(self, shape: Shape) -> tuple[Kept, Tensor, Tensor]:
        """What the backward needs, B' ``[layers, d_out, r]``, and the least ``|c|`` of blocks of rows."""

    @abstractmethod
    def new_features(self) -> Tensor:
        """Room for the gradient of the networks' features, which :meth:`outer_gradients` fills."""

    @abstractmethod
    def outer_gradients(self, shape: Shape, kept: Kept, arrived: Arrived, features: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of W2_A and W2_B of the layers of a shape, ``[layers, d_in, h]`` and ``[layers, d_out, h]``."""

    @abstractmethod
    def inner_gradients(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the networks' embeddings and W1, ``[networks, r, e]`` and ``[networks, h, e]``."""

    def forward(self, *, lean: bool) -> tuple[Sides, list[Kept | None]]:
        """What each layer gets, and what the backward needs, shape by shape; None to make it again then, if lean."""
        made = [self.values(shape) for shape in self.shapes]  # all launches first: the GPU waits for them
        parts = [
            Part(values.A, scaled_B, values.scale, Smallness(least, shape.thresholds))
            for shape, (values, scaled_B, least) in zip(self.shapes, made, strict=True)
        ]
        keepers = None if lean or self._knows_keepers else Keepers(len(self.rows), self._hear)
        sides = Sides(parts, self._places, self._recomputed, self._recomputed_under_hooks, keepers)
        return sides, [None if lean else values for values, _, _ in made]

    def tau(self, shape: Shape) -> Tensor:
        """``[layers, 1]`` or ``[layers, d_out]``."""
        raw = torch.cat([self.rows[i].raw_tau for i in shape.members])
        tau = F.softplus(raw).view(len(shape.members), -1)
        d_out, groups = shape.sizes[0], tau.shape[1]
        return tau if groups in (1, d_out) else tau.repeat_interleave(d_out // groups, 1)

    def depends_on(self, layers: Sequence[bool]) -> list[bool]:
        """Which of :attr:`parameters` the weight sides of these layers are made of."""
        inner = [any(layers[user // 2] for user in users) for users in self.networks.users]
        return [needed for needed in inner for _ in range(2)] + [needed for needed in layers for _ in range(4)]

    def backward(self, kept: list[Kept | None], taken: list[list[Sent]]) -> list[Tensor | None]:
        """The gradients of :attr:`parameters` from what the layers sent; None for those of layers that sent nothing."""
        used = [_is_distributed() or bool(sent) for sent in taken]
        own: list[tuple[Tensor | None, ...]] = [(None,) * 4] * len(self.rows)
        features = self.new_features()
        for shape in self.shapes:
            found = self._backward_shape(shape, kept[shape.number] or self.values(shape)[0], taken, features)
            for member, *gradients in zip(shape.members, *(tensor.unbind() for tensor in found), strict=True):
                if used[member]:
                    own[member] = tuple(gradients)
        inner: list[Tensor | None] = []
        embeddings, firsts = self.inner_gradients(features)
        for users, *pair in zip(self.networks.users, embeddings.unbind(), firsts.unbind(), strict=True):
            inner += pair if any(used[user // 2] for user in users) else (None, None)
        return [*inner, *(gradient for gradients in own for gradient in gradients)]

    def _backward_shape(
        self, shape: Shape, kept: Kept, taken: list[list[Sent]], features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of W2_A, W2_B, magnitude and raw tau, ``[layers, ...]``."""
        row, (d_out, _, rank), (A, B, aligned, norm, scale, tau) = shape.row, shape.sizes, kept
        sent = self._all_sent(shape, kept, taken)
        addresses = upload(
            [[s.for_A.data_ptr(), s.for_B.data_ptr(), s.sums.data_ptr(), s.of_output] for s in sent], self.device
        )
        count, groups, parts = len(sent), row.raw_tau.numel(), parts_of_sums(d_out)
        grad_B, grad_magnitude, grad_tau = torch.empty_like(B), torch.empty_like(norm), torch.empty_like(norm)
        grad_product = B if row.detach_norm else torch.empty_like(B, dtype=A.dtype)
        launch(
            finish_fleet_kernel, (cdiv(d_out, 32), count),
            (shape.table, addresses, B, aligned, norm, scale, tau, grad_B, grad_product, grad_magnitude, grad_tau),
            (d_out, rank, parts, d_out // groups, row.scaling),
            TAU_PER_ROW=tau.shape[1] > 1, DETACH=row.detach_norm,
            PARTS=padded(parts), BLOCK_D=32, BLOCK_R=min(64, padded(rank)),
        )  # fmt: skip
        outer = self.outer_gradients(shape, kept, Arrived(addresses, sent, grad_B, grad_product), features)
        return *outer, grad_magnitude, grad_tau.view(count, groups, -1).sum(2)

    @staticmethod
    def _all_sent(shape: Shape, kept: Kept, taken: list[list[Sent]]) -> list[Sent]:
        """What each layer sent, over all its calls; zeros for a layer that was not used. It is gone from ``taken``."""
        found = []
        for index, member in enumerate(shape.members):
            found.append(together(taken[member], kept.B[index], kept.scale[index], shape.row.scaling))
            taken[member] = []
        if None not in found:
            return found  # type: ignore[return-value]
        d_out, d_in, rank = shape.sizes
        zeros = kept.B.new_zeros
        nothing = Sent(-1, zeros(rank, d_in), zeros(d_out, rank), zeros(parts_of_sums(d_out), d_out), of_output=False)
        return [nothing if each is None else each for each in found]
