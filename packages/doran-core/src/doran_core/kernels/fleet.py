"""The adapted layers of one model whose weight side is computed at once (weight_side.py), and when that is done anew.

A weight side is made by the first layer of a forward pass that asks, for all layers that can have one, and serves each
of them once: a layer that asks again has begun another pass. Whatever does not fit (a parameter that is sharded, a
layer that is called more often than the others, a graph being captured) is left to the layer alone, see layer.py.
"""

from __future__ import annotations

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

    @property
    def config(self) -> object:
        """The method's options; another object if they change."""
        ...

    def place(self, view: BaseView) -> Place | None:
        """Where the tensors of a :class:`~doran_core.kernels.weight_side.Row` are; None if it cannot have one now."""
        ...

    def row(self, tensors: Sequence[Tensor], view: BaseView) -> Row:
        """The row with these tensors."""
        ...

    def squared_norm_of_base(self, view: BaseView) -> Tensor:
        """Renews what is kept of the base layer, if it has changed."""
        ...


class _Entry:
    """A layer of a fleet, as it was when it was last looked at.

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
        self._seen: tuple[object, ...] = ()

    def look(self, member: Member) -> bool:
        """Take what is there now; whether it differs from what was there before, for the kernels."""
        if self.row is not None and self.unchanged() and self._facts(member) == self._seen:
            return False
        had_row = self.row is not None
        member.squared_norm_of_base(self.view)
        place = member.place(self.view)
        tensors = [] if place is None else [names.get(name) for names, name in place.slots]
        usable = place is not None and not any(place.hooks) and all(map(_is_usable, tensors)) and _fit(tensors)
        self._place = place if usable else None
        self.tensors = tensors if usable else []  # type: ignore[assignment]
        self.row = member.row(self.tensors, self.view) if usable else None
        self._seen = self._facts(member)
        return had_row or usable

    def _facts(self, member: Member) -> tuple[object, ...]:
        """Addresses, the count of writes to W0, and what else a row is made of."""
        addresses = [tensor.data_ptr() for tensor in self.tensors]
        version = self.tensors[-1]._version if self.tensors else None
        return *addresses, version, id(member.config), self.view.bias is None

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

    def is_spent(self) -> bool:
        """Whether a backward pass went through it: then parameters may have changed, even past PyTorch's counters."""
        return any(flag[0] for flag in self.spent)


class Fleet:
    """The layers whose factors one builder made, and their weight side at hand."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[Any, _Entry] = WeakKeyDictionary()
        self._families: list[tuple[list[_Entry], Family]] = []
        self._device: torch.device | None = None
        self._gathered = 0
        self._now: _Generation | None = None

    def __reduce__(self) -> tuple[type[Fleet], tuple[()]]:
        return Fleet, ()  # a copy of the model has other layers, which enlist themselves

    def enlist(self, member: Member, view: BaseView) -> None:
        """Take a layer in, or its new base layer."""
        known = self._entries.get(member)
        if known is None or known.view is not view:
            self._entries[member] = _Entry(view)
            self._device = self._now = None

    def ask(self, member: Member, view: BaseView) -> tuple[Side, Tensor] | None:
        """The layer's part of a weight side, and its ticket; None if it is to compute it alone.

        Call this with gradients enabled, for a half-precision layer on a GPU whose base product is made by the kernels.
        """
        entry, now = self._entries.get(member), self._now
        if entry is None or entry.view is not view:
            if torch._C._current_graph_task_id() == -1:
                self.enlist(member, view)
            return None
        stream = _stream(view)
        issued = None if now is None or now.stream != stream else now.issued.get(id(entry))
        if torch._C._current_graph_task_id() != -1:
            # Checkpointing repeats a forward pass inside a backward pass: what the layer had then, it has again.
            return (issued.side, issued.ticket) if issued is not None and issued.used else None
        valid = now is not None and issued is not None and issued.is_valid(view) and not now.is_spent()
        if valid and issued is not None and now is not None:
            if not issued.used:
                issued.used = True
                now.uses += 1
                return issued.side, issued.ticket
            if 2 * now.uses < len(now.issued):
                return None
        return self._begin(member, stream)

    def _begin(self, member: Member, stream: int) -> tuple[Side, Tensor] | None:
        """A new weight side; the asking layer's part of it."""
        if (stream and torch.cuda.is_current_stream_capturing()) or _is_composed():
            return None
        changed = [entry.look(each) for each, entry in self._entries.items()]
        asking = self._entries[member]
        if asking.row is None:
            return None
        self._now = None  # its memory is free for the next
        device = asking.row.weight.device
        if any(changed) or device != self._device or self._gathered != len(self._entries):
            self._gather(device)
        self._now = generation = _Generation(stream)
        # Whoever hooks what autograd saves, as checkpointing does, is short of memory.
        frugal = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        for entries, family in self._families:
            self._issue(generation, entries, family, frugal=frugal)
        issued = generation.issued[id(asking)]
        issued.used = True
        generation.uses = 1
        return issued.side, issued.ticket

    def _gather(self, device: torch.device) -> None:
        """The layers on a device, by what their kernels have in common."""
        from doran_core.kernels.weight_side import Family

        grouped: dict[Any, list[_Entry]] = {}
        for entry in self._entries.values():
            if entry.row is not None and entry.row.weight.device == device:
                grouped.setdefault(entry.row.family, []).append(entry)
        self._device = device
        self._families = [(entries, Family([e.row for e in entries])) for entries in grouped.values()]  # type: ignore[misc]
        self._gathered = len(self._entries)

    @staticmethod
    def _issue(generation: _Generation, entries: list[_Entry], family: Family, *, frugal: bool) -> None:
        from doran_core.kernels.weight_side import WeightSide

        sides: list[Side] = []
        spent = [False]
        tickets = WeightSide.apply(family, sides, spent, frugal, *family.parameters)  # type: ignore[no-untyped-call]
        generation.spent.append(spent)
        for entry, side, ticket in zip(entries, sides, tickets, strict=True):
            versions = [tensor._version for tensor in entry.tensors]
            generation.issued[id(entry)] = _Issued(entry, versions, side, ticket)


def _stream(view: BaseView) -> int:
    """The device's current stream; 0 on the CPU, where Triton's interpreter runs."""
    device = view.weight().device  # type: ignore[union-attr]
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
