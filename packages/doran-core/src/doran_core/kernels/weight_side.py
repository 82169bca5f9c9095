"""The weight side of many layers as one step: from all their parameters to A, B' and c of each, and back.

A layer's forward and backward (prepared.py) then launch what those of a plain low-rank adapter launch. What they learn
of the gradients they leave with their :class:`Side`, as a :class:`Sent`. Autograd knows of it by a *ticket*, one
element that all layers of a family take as an input and that none has a gradient for: the weight side's backward is
called when all of theirs were. See layer.py for the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core import functional
from doran_core.errors import BackendError
from doran_core.kernels.backend import interpreting
from doran_core.kernels.launch import launch
from doran_core.kernels.layer import SECOND_DERIVATIVE
from doran_core.kernels.passes import small_scale
from doran_core.kernels.triton_fleet import (
    COLUMNS,
    assemble_fleet_kernel,
    finish_fleet_kernel,
    generate_fleet_kernel,
    inner_gradient_fleet_kernel,
    outer_gradient_fleet_kernel,
    weight_product_fleet_kernel,
)
from doran_core.kernels.triton_passes import cdiv, dot_precision, padded, parts_of_sums

__all__ = ["Family", "Row", "Sent", "Side", "WeightSide"]

_BLOCK = 128
"""Columns of A or rows of B that a program of the networks' kernels has."""
_ROWS_PER_PART = 4096
"""Rows of W0 that one program of ``M^T W0`` goes through."""
_INTERPRETING = interpreting()

_REPEATED = 1 / 16
_REPEATED_UNDER_HOOKS = 1 / 6
"""Share of the adapted layers' products with W0, forward and backward, that may be done once more so that some outputs
need not be kept; and under hooks on saved tensors, as of checkpointing, which are there to spare memory: what a block
keeps is then all of the memory, and a sixth is what the projections of attention cost."""


def _repeated(sizes: Sequence[Sequence[int]], share: float) -> list[bool]:
    """Which layers, by their ``[d_out, d_in]``, do not keep their output.

    A kept output costs d_out numbers a token, and computing it again d_in times as many operations: so those of fewest
    columns come first, and of these those of fewest rows, which attention layers are: what a gated MLP makes of its
    input is kept by others anyway.
    """
    left = share * 2 * sum(d_out * d_in for d_out, d_in in sizes)
    chosen = [False] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (sizes[i][1], sizes[i][0])):
        work = sizes[index][0] * sizes[index][1]
        if work <= left:
            chosen[index], left = True, left - work
    return chosen


class Row(NamedTuple):
    """A layer's tensors, by the columns of a table, and what else its weight side depends on."""

    embedding_A: Tensor
    w1_A: Tensor
    w2_A: Tensor
    embedding_B: Tensor
    w1_B: Tensor
    w2_B: Tensor
    magnitude: Tensor
    raw_tau: Tensor
    squared_norm: Tensor
    weight: Tensor
    has_bias: bool
    slope: float
    scaling: float
    detach_norm: bool
    repair: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that kernels find through a table."""
        return self[: len(COLUMNS)]  # type: ignore[return-value]

    @property
    def options(self) -> tuple[Any, ...]:
        """What is no tensor."""
        return self[len(COLUMNS) :]

    @property
    def family(self) -> tuple[Any, ...]:
        """What the layers of one :class:`Family` have in common."""
        return self.weight.device, self.weight.dtype, self.embedding_A.shape, self.w1_A.shape, self.slope

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the layers of one launch have in common besides."""
        return *self.weight.shape, self.scaling, self.raw_tau.numel(), self.detach_norm, self.repair


assert Row._fields[: len(COLUMNS)] == COLUMNS


class _Kept(NamedTuple):
    """What the backward of the layers of one shape needs; the first dimension is the layer."""

    A: Tensor
    B: Tensor
    aligned: Tensor
    norm: Tensor
    scale: Tensor
    tau: Tensor


class _Smallness:
    """Which layers have a scale too near 0 for their output to stand in for their base's; on its way to the host."""

    def __init__(self, least: Tensor, thresholds: Sequence[float]) -> None:
        self._thresholds = thresholds
        self._event: torch.cuda.Event | None = None
        self._small: list[bool] | None = None
        self._least = least
        if least.is_cuda:
            self._least = torch.empty(least.shape, dtype=least.dtype, pin_memory=True)
            self._least.copy_(least, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def __getitem__(self, layer: int) -> bool:
        if self._small is None:
            if self._event is not None:
                self._event.synchronize()  # recorded a whole forward ago
            least: list[float] = self._least.amin(1).tolist()
            # not (a >= b): a scale that is not a number is small
            self._small = [not value >= bound for value, bound in zip(least, self._thresholds, strict=True)]
        return self._small[layer]


class Sent(NamedTuple):
    """What a layer's backward tells of one of its calls.

    Attributes:
        graph_task: of the backward pass, by PyTorch's number.
        for_A: the branch's gradient of A, ``[r, d_in]`` float32.
        for_B: ``P = G^T x A^T``, ``[d_out, r]`` float32.
        sums: of :meth:`Passes.scale_gradient`, ``[parts, d_out]`` float32.
        of_output: these are of the layer's output, not of its base's.
    """

    graph_task: int
    for_A: Tensor
    for_B: Tensor
    sums: Tensor
    of_output: bool


class Side:
    """What one layer gets.

    Attributes:
        A: ``[r, d_in]`` in the layer's dtype.
        scaled_B: ``B'``, ``[d_out, r]``, likewise.
        scale: ``c``, ``[d_out]`` float32.
            repeats: the layer is not to keep its output, but to compute its base's output again.
        repeats_under_hooks: likewise, for a call under hooks on saved tensors.
        sent: what its backward told, of calls that the weight side's backward has not taken yet.
    """

    __slots__ = ("A", "_index", "_smallness", "repeats", "repeats_under_hooks", "scale", "scaled_B", "sent")

    def __init__(self, A: Tensor, scaled_B: Tensor, scale: Tensor, small: _Smallness, index: int) -> None:
        self.A, self.scaled_B, self.scale = A, scaled_B, scale
        self.repeats = self.repeats_under_hooks = False
        self.sent: list[Sent] = []
        self._smallness, self._index = small, index

    def is_small(self) -> bool:
        """Whether some ``|c|`` is too near 0 for the output to tell the base's output."""
        return self._smallness[self._index]

    def take(self, graph_task: int) -> list[Sent]:
        """What was sent in this backward pass."""
        taken = [sent for sent in self.sent if sent.graph_task == graph_task]
        self.sent = [sent for sent in self.sent if sent.graph_task != graph_task]
        return taken


def _together(sent: Sequence[Sent], B: Tensor, scale: Tensor, scaling: float) -> Sent | None:
    """The sum over a layer's calls; None if there were none."""
    if len(sent) < 2:
        return sent[0] if sent else None
    every = all(each.of_output for each in sent)
    sums = []
    for each in sent:
        total = each.sums
        if each.of_output and not every:  # y - bias = c z + g B h, summed with G
            total = torch.zeros_like(total)
            total[0] = each.sums.sum(0) / scale - scaling * (each.for_B * B).sum(1)
        sums.append(total)
    for_A, for_B = (torch.stack(factors).sum(0) for factors in ([e.for_A for e in sent], [e.for_B for e in sent]))
    return Sent(sent[0].graph_task, for_A, for_B, torch.stack(sums).sum(0), every)


def _is_distributed() -> bool:
    """Whether gradients are exchanged with other processes: then layers that were not used send zeros, and no None.

    A wrapper such as DistributedDataParallel takes all parameters of a family for used where one is.
    """
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _address_table(rows: Iterable[tuple[Tensor, ...]], device: torch.device) -> Tensor:
    return _upload([[tensor.data_ptr() for tensor in row] for row in rows], device)


def _upload(numbers: Any, device: torch.device) -> Tensor:
    host = torch.tensor(numbers, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@dataclass
class _Shape:
    """The layers of one launch."""

    members: list[int]
    row: Row
    table: Tensor
    thresholds: list[float]
    first_block: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``(d_out, d_in, r)``."""
        return *self.row.weight.shape, self.row.embedding_A.shape[0]

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of A and of B in a layer."""
        d_out, d_in, _ = self.sizes
        return cdiv(d_in, _BLOCK), cdiv(d_out, _BLOCK)


class Family:
    """Layers whose weight sides have the same networks, and how they are computed.

    Args:
        rows: the layers; all of one :attr:`Row.family`.

    Attributes:
        parameters: each once: the networks' embeddings and first layers, then what each layer has for itself.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        row = rows[0]
        device = row.weight.device
        self.rank, self._width = row.embedding_A.shape
        self._hidden = row.w1_A.shape[0]
        self._padded = {"R": padded(self.rank), "E": padded(self._width), "H": padded(self._hidden)}
        grouped: dict[tuple[Any, ...], list[int]] = {}
        for index, each in enumerate(rows):
            grouped.setdefault(each.shape, []).append(index)
        self._shapes: list[_Shape] = []
        blocks = 0
        for members in grouped.values():
            bounds = [small_scale(rows[i].weight.dtype, has_bias=rows[i].has_bias) for i in members]
            table = _address_table((rows[i].tensors for i in members), device)
            self._shapes.append(_Shape(members, rows[members[0]], table, bounds, blocks))
            blocks += len(members) * sum(self._shapes[-1].blocks)
        self._blocks = blocks
        self._collect_networks(device)
        inner = [tensor for pair in self._networks for tensor in pair]
        self.parameters = inner + [t for row in rows for t in (row.w2_A, row.w2_B, row.magnitude, row.raw_tau)]
        sizes = [row.weight.shape for row in rows]
        self._repeated, self._repeated_under_hooks = (
            _repeated(sizes, share) for share in (_REPEATED, _REPEATED_UNDER_HOOKS)
        )
        self._addresses = self.addresses()

    def _collect_networks(self, device: torch.device) -> None:
        """The distinct networks, and which blocks of the gradient of the features are theirs."""
        networks: dict[int, tuple[Tensor, Tensor]] = {}
        blocks: dict[int, list[int]] = {}
        users: dict[int, list[int]] = {}
        for shape in self._shapes:
            next_block = shape.first_block
            for member in shape.members:
                row = self.rows[member]
                pairs = ((row.embedding_A, row.w1_A), (row.embedding_B, row.w1_B))
                for (embedding, w1), count in zip(pairs, shape.blocks, strict=True):
                    networks[id(embedding)] = embedding, w1
                    users.setdefault(id(embedding), []).append(member)
                    blocks.setdefault(id(embedding), []).extend(range(next_block, next_block + count))
                    next_block += count
        ends = [0]
        for key in networks:
            ends.append(ends[-1] + len(blocks[key]))
        self._most_blocks = max(map(len, blocks.values()))
        self._networks = list(networks.values())
        self._users = list(users.values())
        self._trunks = _address_table(self._networks, device)
        self._ranges = _upload(ends, device)
        self._members = _upload([block for key in networks for block in blocks[key]], device)

    def addresses(self) -> list[int]:
        """Where all tensors of all layers are now."""
        return [tensor.data_ptr() for row in self.rows for tensor in row.tensors]

    def up_to_date(self) -> Family:
        """Itself, or one made anew if tensors were moved (``tensor.data = ...``) since its tables were made."""
        return self if self.addresses() == self._addresses else Family(self.rows)

    def forward(self, *, lean: bool) -> tuple[list[Side], list[_Kept | None]]:
        """What each layer gets, and what the backward needs, shape by shape; None to make it again then, if lean."""
        sides: list[Side | None] = [None] * len(self.rows)
        kept: list[_Kept | None] = []
        for shape in self._shapes:
            values, scaled_B, least = self._values(shape)
            small = _Smallness(least, shape.thresholds)
            layers = zip(shape.members, values.A.unbind(), scaled_B.unbind(), values.scale.unbind(), strict=True)
            for index, (member, A, B, scale) in enumerate(layers):
                sides[member] = side = Side(A, B, scale, small, index)
                side.repeats = self._repeated[member]
                side.repeats_under_hooks = self._repeated_under_hooks[member]
            kept.append(None if lean else values)
        return sides, kept  # type: ignore[return-value]

    def _tau(self, shape: _Shape) -> Tensor:
        """``[layers, 1]`` or ``[layers, d_out]``."""
        raw = torch.cat([self.rows[i].raw_tau for i in shape.members])
        tau = F.softplus(raw).view(len(shape.members), -1)
        d_out, groups = shape.sizes[0], tau.shape[1]
        return tau if groups in (1, d_out) else tau.repeat_interleave(d_out // groups, 1)

    def _values(self, shape: _Shape) -> tuple[_Kept, Tensor, Tensor]:
        """What the backward needs, B' ``[layers, d_out, r]``, and the least ``|c|`` of blocks of rows."""
        row, count = shape.row, len(shape.members)
        d_out, d_in, rank = shape.sizes
        weight = row.weight
        A = weight.new_empty(count, rank, d_in)
        B = weight.new_empty(count, d_out, rank, dtype=torch.float32)
        blocks_A, blocks_B = shape.blocks
        launch(
            generate_fleet_kernel, (blocks_A + blocks_B, count), (shape.table, A, B),
            (d_in, d_out, rank, self._width, self._hidden, row.slope, blocks_A), **self._padded, BLOCK=_BLOCK,
        )  # fmt: skip
        tau = self._tau(shape)
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
        return _Kept(A, B, aligned, norm, scale, tau), scaled_B, least

    def backward(self, sides: list[Side], kept: list[_Kept | None], graph_task: int) -> list[Tensor | None]:
        """The gradients of :attr:`parameters` from what the layers sent; None for those of layers that sent nothing."""
        device = self.rows[0].weight.device
        features = torch.empty(self._blocks, self._padded["R"], self._padded["H"], dtype=torch.float32, device=device)
        taken = [side.take(graph_task) for side in sides]
        if not any(taken):
            return [None] * len(self.parameters)
        used = [_is_distributed() or bool(sent) for sent in taken]
        own: list[tuple[Tensor | None, ...]] = [(None,) * 4] * len(self.rows)
        for index, shape in enumerate(self._shapes):
            values = kept[index] or self._values(shape)[0]
            found = self._backward_shape(shape, values, taken, features)
            del values
            for member, *gradients in zip(shape.members, *(tensor.unbind() for tensor in found), strict=True):
                if used[member]:
                    own[member] = tuple(gradients)
        count = len(self._networks)
        grad_embedding = features.new_empty(count, self.rank, self._width)
        grad_w1 = features.new_empty(count, self._hidden, self._width)
        launch(
            inner_gradient_fleet_kernel, (count,),
            (self._trunks, self._ranges, self._members, features, grad_embedding, grad_w1),
            (self._most_blocks, self.rank, self._width, self._hidden, self.rows[0].slope),
            **self._padded, AT_ONCE=max(1, 16384 // (self._padded["R"] * self._padded["H"])), num_warps=8,
        )  # fmt: skip
        inner: list[Tensor | None] = []
        for users, *pair in zip(self._users, grad_embedding.unbind(), grad_w1.unbind(), strict=True):
            inner += pair if any(used[member] for member in users) else (None, None)
        return [*inner, *(gradient for gradients in own for gradient in gradients)]

    def _backward_shape(
        self, shape: _Shape, kept: _Kept, taken: Sequence[Sequence[Sent]], features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of W2_A, W2_B, magnitude and raw tau, ``[layers, ...]``."""
        row, (d_out, d_in, rank), (A, B, aligned, norm, scale, tau) = shape.row, shape.sizes, kept
        count = len(shape.members)
        parts = parts_of_sums(d_out)
        found = [
            _together(taken[member], B[index], scale[index], row.scaling) for index, member in enumerate(shape.members)
        ]
        nothing = None
        if None in found:  # a layer that was not used counts as one that sent zeros
            zeros = (B.new_zeros(size) for size in ((rank, d_in), (d_out, rank), (parts, d_out)))
            nothing = Sent(-1, *zeros, of_output=False)
        sent = [nothing if each is None else each for each in found]
        addresses = _upload(
            [[s.for_A.data_ptr(), s.for_B.data_ptr(), s.sums.data_ptr(), s.of_output] for s in sent],
            B.device,  # type: ignore[union-attr]
        )
        groups = row.raw_tau.numel()
        grad_B, grad_magnitude, grad_tau = torch.empty_like(B), torch.empty_like(norm), torch.empty_like(norm)
        grad_product = B if row.detach_norm else torch.empty_like(B, dtype=A.dtype)
        launch(
            finish_fleet_kernel, (cdiv(d_out, 32), count),
            (shape.table, addresses, B, aligned, norm, scale, tau, grad_B, grad_product, grad_magnitude, grad_tau),
            (d_out, rank, parts, d_out // groups, row.scaling),
            TAU_PER_ROW=tau.shape[1] > 1, DETACH=row.detach_norm,
            PARTS=padded(parts), BLOCK_D=32, BLOCK_R=padded(rank),
        )  # fmt: skip
        parts = 1
        through_norm = mixed = B  # pointers that are not followed may be any
        if not row.detach_norm:
            parts = cdiv(d_out, _ROWS_PER_PART)
            through_norm = B.new_empty(count, parts, rank, d_in)
            block_k = 128
            launch(
                weight_product_fleet_kernel, (cdiv(d_in, block_k), parts, count),
                (shape.table, grad_product, through_norm), (d_out, d_in, rank, cdiv(d_out, parts)),
                PRECISION=dot_precision(A), WIDEN=_INTERPRETING,
                BLOCK_T=64, BLOCK_R=padded(rank), BLOCK_K=block_k, num_stages=4,
            )  # fmt: skip
            mixed = torch.bmm(grad_product.transpose(1, 2), B.to(A.dtype))
        grad_w2_A = B.new_empty(count, d_in, self._hidden)
        grad_w2_B = B.new_empty(count, d_out, self._hidden)
        blocks_A, blocks_B = shape.blocks
        own_features = features[shape.first_block :]
        launch(
            outer_gradient_fleet_kernel, (blocks_A + blocks_B, count),
            (shape.table, addresses, through_norm, mixed, A, grad_B, grad_w2_A, grad_w2_B, own_features),
            (d_in, d_out, rank, self._width, self._hidden, row.slope, blocks_A, parts, row.scaling),
            DETACH=row.detach_norm, **self._padded, BLOCK=_BLOCK,
        )  # fmt: skip
        return grad_w2_A, grad_w2_B, grad_magnitude, grad_tau.view(count, groups, -1).sum(2)


class WeightSide(torch.autograd.Function):
    """:class:`Family` for autograd: ``apply(family, sides, spent, lean, *family.parameters)`` gives the ticket.

    ``sides`` is filled, and ``spent[0]`` set by the first backward pass. What the backward needs is kept past it, for
    several backward passes may go through one forward of the weight side; or it is made again by each, if ``lean``.
    """

    @staticmethod
    def forward(
        ctx: Any, family: Family, sides: list[Side], spent: list[bool], lean: bool, *parameters: Tensor
    ) -> Tensor:
        found, kept = family.forward(lean=lean)
        sides.extend(found)
        ctx.family, ctx.sides, ctx.kept, ctx.spent = family, found, kept, spent
        ctx.parameters = parameters
        ctx.versions = [parameter._version for parameter in parameters]
        ctx.set_materialize_grads(False)
        return found[0].scale.new_empty(1)

    @staticmethod
    def backward(ctx: Any, nothing: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackendError(SECOND_DERIVATIVE)
        if [parameter._version for parameter in ctx.parameters] != ctx.versions:
            raise RuntimeError(
                "a parameter of an adapter was changed in place between a forward pass and its backward pass"
            )
        ctx.spent[0] = True
        task = torch._C._current_graph_task_id()
        return None, None, None, None, *ctx.family.up_to_date().backward(ctx.sides, ctx.kept, task)
