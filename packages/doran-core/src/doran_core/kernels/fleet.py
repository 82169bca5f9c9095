"""The adapted layers of one model whose weight side is computed at once (weight_side.py), and when that is done anew.

A weight side is made by the first layer of a forward pass that asks, for all layers that can have one, and serves each
of them once: a layer that asks again has most likely begun another pass. Whatever does not fit is left to the layer
alone, see layer.py: a parameter that is sharded or elsewhere, a layer that is called more often than the others, a
graph being captured, and reentrant checkpointing, each of whose blocks has a backward pass of its own.

Checkpointing of the other kind repeats a block during the backward pass and takes from the repetition the tensors that
the pass saved. So a layer is served in a repetition if and only if it was served in the pass; which weight side it then
gets does not matter, since the pass keeps its own.

All gradients of the adapters come at the end of a backward pass.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from doran_core.kernels.weight_side import Family, Row, Side
    from doran_core.layers.base import BaseView  # which imports the package of this module

__all__ = ["Fleet", "Given", "Member", "Place", "Slot"]

Slot = tuple[Mapping[str, Any], str]
"""Where a module keeps something: one of its dictionaries, and the name there."""


class Place(NamedTuple):
    """Where a layer's tensors are.

    Attributes:
        slots: one for each tensor.
        others: of everything else that the row, or the place itself, depends on.
        hooks: dictionaries of hooks that would see a call that is not made; the place is none while there are any.
    """

    slots: list[Slot]
    others: list[Slot]
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
        served: its last forward pass was served, and so its repetition is to be.
    """

    def __init__(self, view: BaseView) -> None:
        self.view = view
        self.tensors: list[Tensor] = []
        self.row: Row | None = None
        self.served = False
        self._place: Place | None = None
        self._slots: list[tuple[Mapping[str, Any], str, Any]] = []
        self._tensor_slots: list[tuple[Mapping[str, Any], str, Tensor]] = []
        self._addresses: list[int] = []

    def look(self, member: Member) -> bool:
        """Take what is there now; whether it differs from what was there before, for the kernels."""
        if self._is_current() and not member.is_stale(self.view):
            return False
        before, addresses = self.row, self._addresses
        place = member.place(self.view)
        tensors = [] if place is None else [names.get(name) for names, name in place.slots]
        usable = place is not None and not any(place.hooks) and all(map(_is_usable, tensors)) and _fit(tensors)
        usable = usable and not member.is_stale(self.view)
        self._place = place if usable else None
        self.tensors = tensors if usable else []  # type: ignore[assignment]
        self.row = member.row(self.tensors, self.view) if usable else None
        self._addresses = [tensor.data_ptr() for tensor in self.tensors]
        self._slots, self._tensor_slots = [], []
        if self._place is not None:
            self._slots = [(names, name, names.get(name)) for names, name in self._place.others]
            self._tensor_slots = [
                (names, name, tensor) for (names, name), tensor in zip(self._place.slots, self.tensors, strict=True)
            ]
        if before is None or self.row is None:
            return before is not self.row
        same = all(map(operator.is_, before.tensors, self.row.tensors)) and before.options == self.row.options
        return not same or addresses != self._addresses

    def _is_current(self) -> bool:
        """Whether nothing that :meth:`look` would find has changed: the usual case, and a tenth of its price."""
        if not self.unchanged():
            return False
        for names, name, value in self._slots:
            if names.get(name) is not value:
                return False
        for tensor, address in zip(self.tensors, self._addresses, strict=True):
            if tensor.data_ptr() != address or not tensor.is_contiguous():
                return False
        return True

    def unchanged(self) -> bool:
        """Whether every tensor is the object that it was, and no hook wants to see more than that."""
        if self._place is None or any(self._place.hooks):
            return False
        for names, name, tensor in self._tensor_slots:  # noqa: SIM110 (a generator takes twice as long)
            if names.get(name) is not tensor:
                return False
        return True

    def versions(self) -> list[int]:
        """PyTorch's counters of what was written to the tensors."""
        return [tensor._version for tensor in self.tensors]


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


class Given(NamedTuple):
    """What a layer gets for one call.

    Attributes:
        side: its part of a weight side.
        ticket: through which autograd knows that its gradients go there.
        repeats: it is not to keep its output, but to compute its base's output again.
    """

    side: Side
    ticket: Tensor
    repeats: bool


class _Issued:
    """A layer's part of a weight side."""

    def __init__(self, entry: _Entry, side: Side, ticket: Tensor) -> None:
        self.entry = entry
        self.used = False
        self.plain = Given(side, ticket, side.repeats)
        self.hooked = Given(side, ticket, side.repeats_under_hooks)
        self._versions = entry.versions()

    def is_valid(self) -> bool:
        """Whether the layer is still what the weight side was made of."""
        return self.entry.unchanged() and self.entry.versions() == self._versions


class _Generation:
    """One weight side of all layers, by the ids of their adapters."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.issued: dict[int, _Issued] = {}
        self.spent: list[list[bool]] = []
        self.uses = 0

    def find(self, member: Member, view: BaseView) -> _Issued | None:
        """A layer's part, if it still holds."""
        issued = self.issued.get(id(member))
        if issued is None or issued.entry.view is not view or self.is_spent() or not issued.is_valid():
            return None
        return issued

    def is_spent(self) -> bool:
        """Whether a backward pass went through it: then parameters may have changed, even past PyTorch's counters."""
        for flag in self.spent:  # noqa: SIM110 (a generator takes twice as long)
            if flag[0]:
                return True
        return False


class Fleet:
    """The layers whose factors one builder made, and their weight side at hand."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[Any, _Entry] = WeakKeyDictionary()
        self._families: dict[torch.device, list[tuple[list[int], list[_Entry], Family]]] = {}
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

    def ask(self, member: Member, view: BaseView) -> Given | None:
        """The layer's part of a weight side for one call; None if it is to compute it alone.

        Call this with gradients enabled, for a half-precision layer on a GPU whose base product is made by the kernels.
        """
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        repetition = torch._C._current_graph_task_id() != -1
        if repetition and not hooked:
            return None
        stream, now = _stream(view), self._now
        issued = None
        if now is not None and now.stream == stream and not _is_composed() and not _is_capturing(stream):
            issued = now.find(member, view)
        if issued is None or (issued.used and not repetition):
            return self._ask_anew(member, view, stream, issued, hooked=hooked, repetition=repetition)
        if not repetition:
            issued.used = issued.entry.served = True
            now.uses += 1  # type: ignore[union-attr]
        elif not issued.entry.served:
            return None
        return issued.hooked if hooked else issued.plain

    def _ask_anew(
        self, member: Member, view: BaseView, stream: int, used: _Issued | None, *, hooked: bool, repetition: bool
    ) -> Given | None:
        """The same where there is no part, or one that has served."""
        entry = self._entries.get(member)
        if entry is None or entry.view is not view:
            self.enlist(member, view)
            return None
        if repetition and not entry.served:
            return None
        issued, now = None, self._now
        if not _is_composed() and not _is_capturing(stream):
            # if few others were called since, it is this layer that is called often
            often = now is not None and used is not None and 2 * now.uses < len(now.issued)
            issued = (used if hooked else None) if often else self._make(member, entry, stream, lean=hooked)
        if not repetition:
            entry.served = issued is not None
        if issued is None or self._now is None:
            return None
        if not repetition and not issued.used:
            issued.used = True
            self._now.uses += 1
        return issued.hooked if hooked else issued.plain

    def _make(self, member: Member, entry: _Entry, stream: int, *, lean: bool) -> _Issued | None:
        """A new weight side; the asking layer's part of it."""
        changed = [each.look(whose) for whose, each in self._entries.items()]
        if any(changed) or self._gathered != len(self._entries):
            self._families = {}
        if entry.row is None:
            return None
        self._now = None  # its memory is free for the next
        device = entry.row.weight.device
        if device not in self._families:
            self._gather(device)
        self._now = generation = _Generation(stream)
        for members, entries, family in self._families[device]:
            self._issue(generation, members, entries, family, lean=lean)
        return generation.issued[id(member)]

    def _gather(self, device: torch.device) -> None:
        """The layers on a device, by what their kernels have in common."""
        from doran_core.kernels.weight_side import Family

        grouped: dict[Any, tuple[list[int], list[_Entry], list[Row]]] = {}
        for member, entry in self._entries.items():
            if entry.row is not None and entry.row.weight.device == device:
                members, entries, rows = grouped.setdefault(entry.row.family, ([], [], []))
                members.append(id(member))
                entries.append(entry)
                rows.append(entry.row)
        self._families[device] = [(members, entries, Family(rows)) for members, entries, rows in grouped.values()]
        self._gathered = len(self._entries)

    @staticmethod
    def _issue(
        generation: _Generation, members: list[int], entries: list[_Entry], family: Family, *, lean: bool
    ) -> None:
        from doran_core.kernels.weight_side import WeightSide

        sides: list[Side] = []
        spent = [False]
        ticket = WeightSide.apply(family, sides, spent, lean, *family.parameters)  # type: ignore[no-untyped-call]
        frozen_ticket = ticket.detach()
        generation.spent.append(spent)
        for member, entry, side in zip(members, entries, sides, strict=True):
            trains = any(tensor.requires_grad for tensor in entry.tensors)  # else others may train beside it
            generation.issued[member] = _Issued(entry, side, ticket if trains else frozen_ticket)


def _is_capturing(stream: int) -> bool:
    """Whether a CUDA graph is being captured; there is no stream 0 then."""
    return stream != 0 and torch.cuda.is_current_stream_capturing()


def _stream(view: BaseView) -> int:
    """The device's current stream; 0 on the CPU, where Triton's interpreter runs."""
    device = view.weight().device  # type: ignore[union-attr]
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
