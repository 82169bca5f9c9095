"""The adapted layers of one model whose weight side is computed at once (weight_side.py), and when that is done anew.

A weight side is made by the first layer of a forward pass that asks, for all layers that can have one, and serves each
of them once: a layer that asks again has most likely begun another pass. Whatever does not fit is left to the layer
alone, see layer.py: a parameter that is sharded or elsewhere, a layer that is called more often than the others, a
graph being captured, and everything under hooks on saved tensors, such as checkpointing, whose repetition of a pass
has to find what the pass itself found.

All gradients of the adapters come at the end of a backward pass.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from doran_core.kernels.weight_side import Family, Row, Side
    from doran_core.layers.base import BaseView  # which imports the package of this module

__all__ = ["Fleet", "Member", "Place", "Slot"]

Slot = tuple[Mapping[str, Any], str]
"""Where a module keeps a tensor: one of its dictionaries, and the name there."""


class Place(NamedTuple):
    """Where a layer's tensors are.

    Attributes:
        slots: one for each tensor.
        hooks: dictionaries of hooks that would see a call that is not made; the place is none while there are any.
    """

    slots: list[Slot]
    hooks: list[Mapping[Any, Any]]


_SHARDED = ("_fsdp_flattened", "ds_id")
"""Marks of parameters whose memory others take away between a forward and a backward pass."""


class Member(Protocol):
    """What a fleet asks of a layer's adapter."""

    def place(self, view: BaseView) -> Place | None:
        """Where the tensors of a :class:`~doran_core.kernels.weight_side.Row` are; None if it cannot have one now."""
        ...

    def row(self, tensors: Sequence[Tensor], view: BaseView) -> Row:
        """The row with these tensors."""
        ...

    def is_stale(self, view: BaseView) -> bool:
        """Whether what is kept of the base layer is that of another weight; the layer's own call renews it."""
        ...


class _Entry:
    """A layer of a fleet, as it was when a weight side was made last.

    Attributes:
        view: of its base layer.
        tensors: of its row; none if it cannot have one.
        row: what the kernels need.
    """

    def __init__(self, view: BaseView) -> None:
        self.view = view
        self.tensors: list[Tensor] = []
        self.row: Row | None = None
        self._place: Place | None = None
        self._addresses: list[int] = []

    def look(self, member: Member) -> bool:
        """Take what is there now; whether it differs from what was there before, for the kernels."""
        before, addresses = self.row, self._addresses
        place = member.place(self.view)
        tensors = [] if place is None else [names.get(name) for names, name in place.slots]
        usable = place is not None and not any(place.hooks) and all(map(_is_usable, tensors)) and _fit(tensors)
        usable = usable and not member.is_stale(self.view)
        self._place = place if usable else None
        self.tensors = tensors if usable else []  # type: ignore[assignment]
        self.row = member.row(self.tensors, self.view) if usable else None
        self._addresses = [tensor.data_ptr() for tensor in self.tensors]
        if before is None or self.row is None:
            return before is not self.row
        same = all(map(operator.is_, before.tensors, self.row.tensors)) and before.options == self.row.options
        return not same or addresses != self._addresses

    def unchanged(self) -> bool:
        """Whether every tensor is the object that it was, and no hook wants to see more than that."""
        place = self._place
        if place is None or any(place.hooks):
            return False
        return all(names.get(name) is tensor for (names, name), tensor in zip(place.slots, self.tensors, strict=True))


def _is_usable(tensor: Any) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_contiguous()
        and tensor.numel() > 0
        and not tensor.is_meta
        and tensor.data_ptr() % 16 == 0
        and not tensor.is_inference()
        and not any(hasattr(tensor, mark) for mark in _SHARDED)
    )


def _fit(tensors: Sequence[Any]) -> bool:
    """Whether all but W0, the last, are float32, and all are on its device."""
    *own, weight = tensors
    return all(tensor.dtype == torch.float32 and tensor.device == weight.device for tensor in own)


def _is_composed() -> bool:
    """Whether a wrapper such as fully_shard may take the memory of parameters away between forward and backward."""
    state = sys.modules.get("torch.distributed._composable_state")
    return bool(state is not None and getattr(state, "_module_state_mapping", True))


@dataclass
class _Issued:
    """A layer's part of a weight side."""

    entry: _Entry
    versions: list[int]
    side: Side
    ticket: Tensor
    used: bool = False

    def is_valid(self, view: BaseView) -> bool:
        """Whether the layer is still what the weight side was made of."""
        entry = self.entry
        return (
            entry.view is view and entry.unchanged() and [tensor._version for tensor in entry.tensors] == self.versions
        )


class _Generation:
    """One weight side of all layers."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.issued: dict[int, _Issued] = {}
        self.spent: list[list[bool]] = []
        self.uses = 0

    def take(self, issued: _Issued) -> tuple[Side, Tensor]:
        """One layer's part, which is used with that."""
        issued.used = True
        self.uses += 1
        return issued.side, issued.ticket

    def is_spent(self) -> bool:
        """Whether a backward pass went through it: then parameters may have changed, even past PyTorch's counters."""
        return any(flag[0] for flag in self.spent)


class Fleet:
    """The layers whose factors one builder made, and their weight side at hand."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[Any, _Entry] = WeakKeyDictionary()
        self._families: dict[torch.device, list[tuple[list[_Entry], Family]]] = {}
        self._gathered = 0
        self._now: _Generation | None = None

    def __reduce__(self) -> tuple[type[Fleet], tuple[()]]:
        return Fleet, ()  # a copy of the model has other layers, which enlist themselves

    def enlist(self, member: Member, view: BaseView) -> None:
        """Take a layer in, or its new base layer."""
        known = self._entries.get(member)
        if known is None or known.view is not view:
            self._entries[member] = _Entry(view)
            self._families, self._now = {}, None

    def release(self) -> None:
        """Give back the memory of a weight side that has served."""
        if self._now is not None and self._now.is_spent():
            self._now = None

    def ask(self, member: Member, view: BaseView) -> tuple[Side, Tensor] | None:
        """The layer's part of a weight side, and its ticket; None if it is to compute it alone.

        Call this with gradients enabled, for a half-precision layer on a GPU whose base product is made by the kernels.
        """
        if _is_repeatable() or _is_composed():
            return None
        entry, now = self._entries.get(member), self._now
        if entry is None or entry.view is not view:
            self.enlist(member, view)
            return None
        stream = _stream(view)
        if stream and torch.cuda.is_current_stream_capturing():
            return None
        issued = None if now is None or now.stream != stream else now.issued.get(id(entry))
        if now is not None and issued is not None and issued.is_valid(view) and not now.is_spent():
            if not issued.used:
                return now.take(issued)
            if 2 * now.uses < len(now.issued):
                return None  # few others were called since: it is this layer that is called often, alone
        return self._begin(entry, stream)

    def _begin(self, asking: _Entry, stream: int) -> tuple[Side, Tensor] | None:
        """A new weight side; the asking layer's part of it."""
        changed = [entry.look(member) for member, entry in self._entries.items()]
        if any(changed) or self._gathered != len(self._entries):
            self._families = {}
        if asking.row is None:
            return None
        self._now = None  # its memory is free for the next
        device = asking.row.weight.device
        if device not in self._families:
            self._gather(device)
        self._now = generation = _Generation(stream)
        for entries, family in self._families[device]:
            self._issue(generation, entries, family)
        return generation.take(generation.issued[id(asking)])

    def _gather(self, device: torch.device) -> None:
        """The layers on a device, by what their kernels have in common."""
        from doran_core.kernels.weight_side import Family

        grouped: dict[Any, tuple[list[_Entry], list[Row]]] = {}
        for entry in self._entries.values():
            if entry.row is not None and entry.row.weight.device == device:
                entries, rows = grouped.setdefault(entry.row.family, ([], []))
                entries.append(entry)
                rows.append(entry.row)
        self._families[device] = [(entries, Family(rows)) for entries, rows in grouped.values()]
        self._gathered = len(self._entries)

    @staticmethod
    def _issue(generation: _Generation, entries: list[_Entry], family: Family) -> None:
        from doran_core.kernels.weight_side import WeightSide

        sides: list[Side] = []
        spent = [False]
        tickets = WeightSide.apply(family, sides, spent, *family.parameters)  # type: ignore[no-untyped-call]
        generation.spent.append(spent)
        for entry, side, ticket in zip(entries, sides, tickets, strict=True):
            versions = [tensor._version for tensor in entry.tensors]
            if not any(tensor.requires_grad for tensor in entry.tensors):  # frozen: others may train beside it
                ticket = ticket.detach()
            generation.issued[id(entry)] = _Issued(entry, versions, side, ticket)


def _is_repeatable() -> bool:
    """Whether a pass may be repeated later, or is such a repetition: hooks on saved tensors, or a backward pass."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return hooked or torch._C._current_graph_task_id() != -1


def _stream(view: BaseView) -> int:
    """The device's current stream; 0 on the CPU, where Triton's interpreter runs."""
    device = view.weight().device  # type: ignore[union-attr]
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
