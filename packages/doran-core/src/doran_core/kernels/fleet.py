"""The adapted layers of one model whose weight side is computed at once (weight_side.py), and when that is done anew.

A weight side is made by the first layer of a forward pass that asks, for all layers that can have one, and serves each
of them once: a layer that asks again has most likely begun another pass. Whatever does not fit is left to the layer
alone, see layer.py: a parameter that is sharded or elsewhere, a layer that is called more often than the others (unless
under checkpointing), a graph being captured, and reentrant checkpointing, each of whose blocks has a backward pass of
its own.

Checkpointing of the other kind repeats a block during the backward pass and takes from the repetition the tensors that
the pass saved. So a layer is served in a repetition if and only if it was served in the pass; which weight side it then
gets does not matter, since the pass keeps its own.

All gradients of the adapters come at the end of a backward pass. A layer's part holds while its tensors are the same
objects, unwritten to as far as PyTorch counts; other changes are noticed when the next pass begins.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from doran_core.kernels.entries import Checks, Entry, Member

if TYPE_CHECKING:
    from doran_core.kernels.family import Family, Row
    from doran_core.kernels.sides import Side, Sides
    from doran_core.layers.base import BaseView  # which imports the package of this module

__all__ = ["Fleet", "Given"]


class Given(NamedTuple):
    """What a layer gets for one call.

    Attributes:
        side: its part of a weight side.
        ticket: through which autograd knows that its gradients go there.
        recomputes: it is not to keep its output, but to compute its base's output again.
    """

    side: Side
    ticket: Tensor
    recomputes: bool


class _Issued:
    """A layer's part of a weight side.

    Args:
        entry: the layer.
        versions: of its tensors when the weight side was made.
        side: its part.
        ticket: of its family.
    """

    def __init__(self, entry: Entry, versions: list[int], side: Side, ticket: Tensor) -> None:
        self.entry = entry
        self.used = False
        self.plain = Given(side, ticket, side.recomputes)
        self.hooked = Given(side, ticket, side.recomputes_under_hooks)
        self._versions = versions

    def is_valid(self) -> bool:
        """Whether the layer is still what the weight side was made of."""
        return self.entry.unchanged() and self.entry.versions() == self._versions


@dataclass
class _Group:
    """The layers of one family, with the ids of their adapters."""

    members: list[int]
    entries: list[Entry]
    family: Family


class _Made(NamedTuple):
    """The weight side of a group, and whether a backward pass went through it."""

    group: _Group
    versions: list[list[int]]
    sides: Sides
    ticket: Tensor
    spent: list[bool]


class _Generation:
    """One weight side of all layers. A layer's part is put together when it is asked for: the GPU waits for the first.

    Args:
        stream: on which it was made.
        groups: all of its device.
        lean: keep only what layers use.
    """

    def __init__(self, stream: int, groups: Sequence[_Group], *, lean: bool) -> None:
        from doran_core.kernels.weight_side import make_sides

        self.stream = stream
        self.uses = 0
        sides = [make_sides(group.family, lean=lean) for group in groups]  # all launches first
        self._made = [
            _Made(group, [entry.versions() for entry in group.entries], *made)
            for group, made in zip(groups, sides, strict=True)
        ]
        self._where = {member: (made, layer) for made in self._made for layer, member in enumerate(made.group.members)}
        self._issued: dict[int, _Issued] = {}

    def __len__(self) -> int:
        return len(self._where)

    def find(self, member: Member, view: BaseView, *, repetition: bool) -> _Issued | None:
        """A layer's part, if it still holds; for a repetition it is that of the pass, whatever has changed."""
        issued = self._issued.get(id(member)) or self._issue(id(member))
        if issued is None or issued.entry.view is not view:
            return None
        return issued if repetition or (not self.is_spent() and issued.is_valid()) else None

    def _issue(self, member: int) -> _Issued | None:
        place = self._where.get(member)
        if place is None:
            return None
        made, layer = place
        entry = made.group.entries[layer]
        trains = any(tensor.requires_grad for tensor in entry.tensors)  # else others may train beside it
        ticket = made.ticket if trains else made.ticket.detach()
        self._issued[member] = issued = _Issued(entry, made.versions[layer], made.sides[layer], ticket)
        return issued

    def is_spent(self) -> bool:
        """Whether a backward pass went through it: then parameters may have changed, even past PyTorch's counters."""
        for made in self._made:  # noqa: SIM110 (a generator takes twice as long)
            if made.spent[0]:
                return True
        return False


class Fleet:
    """The layers whose factors one builder made, and their weight side at hand."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[Any, Entry] = WeakKeyDictionary()
        self._groups: dict[torch.device, list[_Group]] = {}
        self._checks: Checks | None = None
        self._now: dict[torch.device, _Generation] = {}

    def __reduce__(self) -> tuple[type[Fleet], tuple[()]]:
        return Fleet, ()  # a copy of the model has other layers, which enlist themselves

    def enlist(self, member: Member, view: BaseView) -> None:
        """Take a layer in, or its new base layer."""
        known = self._entries.get(member)
        if known is None or known.view is not view:
            self._entries[member] = Entry(view)
            self._groups, self._checks, self._now = {}, None, {}

    def release(self) -> None:
        """Give back the memory of weight sides that have served, and of adapters that are gone."""
        for device in [device for device, now in self._now.items() if now.is_spent()]:
            del self._now[device]
        if self._checks is not None and self._checks.count != len(self._entries):
            self._groups, self._checks, self._now = {}, None, {}

    def ask(self, member: Member, view: BaseView) -> Given | None:
        """The layer's part of a weight side for one call; None if it is to compute it alone.

        Call this with gradients enabled, for a half-precision layer on a GPU whose base product is made by the kernels.
        """
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        repetition = torch._C._current_graph_task_id() != -1
        if repetition and not hooked:
            return None
        device, stream = _device_and_stream(view)
        now, part = self._now.get(device), None
        usable = not (_is_composed() or _is_capturing(stream))
        if usable and now is not None and now.stream == stream:
            part = now.find(member, view, repetition=repetition)
        entry = self._entries.get(member) if part is None else part.entry
        if entry is None or entry.view is not view:
            self.enlist(member, view)
            return None
        if part is None or (part.used and not repetition):
            if usable and (entry.served or not repetition):
                now, part = self._give_again(member, entry, now, part, stream, hooked=hooked)
            else:
                part = None
        if repetition:
            return part.hooked if part is not None and entry.served else None
        if hooked:
            entry.served = part is not None
        if part is None or now is None:
            return None
        if not part.used:
            part.used = True
            now.uses += 1
        return part.hooked if hooked else part.plain

    def _give_again(
        self,
        member: Member,
        entry: Entry,
        now: _Generation | None,
        previous: _Issued | None,
        stream: int,
        *,
        hooked: bool,
    ) -> tuple[_Generation | None, _Issued | None]:
        """A part for a layer whose previous one has served, or does not hold, and the weight side that it is of."""
        if now is not None and previous is not None and 2 * now.uses < len(now):
            # few others were called since, so it is this layer that is called often
            return now, previous if hooked else None
        if not self._can_be_served(member, entry):
            return None, None
        self._look()
        if entry.row is None:
            return None, None
        device = entry.row.weight.device
        self._now.pop(device, None)  # its memory is free for the next
        if device not in self._groups:
            self._groups[device] = self._gather(device)
        made = _Generation(stream, self._groups[device], lean=hooked)
        self._now[device] = made
        return made, made.find(member, entry.view, repetition=False)

    def _can_be_served(self, member: Member, entry: Entry) -> bool:
        """Whether the layer had a row, or has one now. Most layers without one never have: the others may wait."""
        if entry.row is not None:
            return True
        if entry.look(member):
            self._groups, self._checks = {}, None
        return entry.row is not None

    def _look(self) -> None:
        """Notice what has changed in the layers since the last time."""
        known = self._checks if self._checks is not None and self._checks.count == len(self._entries) else None
        if known is not None and known.hold():
            if not known.look_again():
                return
            changed = [True]
        else:
            changed = [entry.look(member) for member, entry in self._entries.items()]
        if any(changed) or known is None:
            self._groups = {}
        self._checks = Checks(self._entries.items())

    def _gather(self, device: torch.device) -> list[_Group]:
        """The layers on a device, by what their kernels have in common."""
        from doran_core.kernels.weight_side import make_family

        grouped: dict[Any, tuple[list[int], list[Entry], list[Row]]] = {}
        for member, entry in self._entries.items():
            if entry.row is not None and entry.row.weight.device == device:
                members, entries, rows = grouped.setdefault(entry.row.family, ([], [], []))
                members.append(id(member))
                entries.append(entry)
                rows.append(entry.row)
        return [_Group(members, entries, make_family(rows)) for members, entries, rows in grouped.values()]


def _is_capturing(stream: int) -> bool:
    """Whether a CUDA graph is being captured; there is no stream 0 then."""
    return stream != 0 and torch.cuda.is_current_stream_capturing()


def _device_and_stream(view: BaseView) -> tuple[torch.device, int]:
    """The layer's device and its current stream; 0 on the CPU, where Triton's interpreter runs."""
    device = view.weight().device  # type: ignore[union-attr]
    return device, torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _is_composed() -> bool:
    """Whether a wrapper such as fully_shard may take the memory of parameters away between forward and backward."""
    state = sys.modules.get("torch.distributed._composable_state")
    return bool(state is not None and getattr(state, "_module_state_mapping", True))
