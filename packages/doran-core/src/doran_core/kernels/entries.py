"""Where the layers of a fleet keep what a weight side is made of, and whether it is still there."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from doran_core.kernels.family import Row
    from doran_core.layers.base import BaseView  # which imports the package of this module

__all__ = ["Checks", "Entry", "Member", "Place", "Slot"]

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
        """Where the tensors of a :class:`~doran_core.kernels.family.Row` are; None if it cannot have one now."""
        ...

    def row(self, tensors: Sequence[Tensor], view: BaseView) -> Row:
        """The row with these tensors."""
        ...

    def refresh(self, view: BaseView) -> None:
        """Take anew what is kept of the base layer, if it is that of another weight."""
        ...


class Entry:
    """A layer of a fleet, as it was when a weight side was made last.

    Attributes:
        view: of its base layer.
        place: where its tensors are; None if it cannot have a row.
        tensors: there.
        row: what the kernels need.
        served: its last call under hooks on saved tensors was served, and so a repetition of it is to be.
    """

    def __init__(self, view: BaseView) -> None:
        self.view = view
        self.tensors: list[Tensor] = []
        self.row: Row | None = None
        self.served = False
        self.place: Place | None = None
        self._slots: list[tuple[Mapping[str, Any], str, Tensor]] = []
        self._addresses: list[int] = []

    def look(self, member: Member) -> bool:
        """Take what is there now; whether it differs from what was there before, for the kernels."""
        before, addresses = self.row, self._addresses
        place = member.place(self.view)
        if place is not None and not self.view.weight().is_meta:  # type: ignore[union-attr]
            member.refresh(self.view)
        tensors = [] if place is None else [names.get(name) for names, name in place.slots]
        usable = place is not None and not any(place.hooks) and all(map(_is_usable, tensors)) and _fit(tensors)
        self.place = place if usable else None
        self.tensors = tensors if usable else []  # type: ignore[assignment]
        self.row = member.row(self.tensors, self.view) if usable else None
        self._addresses = [tensor.data_ptr() for tensor in self.tensors]
        slots = [] if self.place is None else self.place.slots
        self._slots = [(names, name, tensor) for (names, name), tensor in zip(slots, self.tensors, strict=True)]
        if before is None or self.row is None:
            return before is not self.row
        same = all(map(operator.is_, before.tensors, self.row.tensors)) and before.options == self.row.options
        return not same or addresses != self._addresses

    def unchanged(self) -> bool:
        """Whether every tensor is the object that it was, and no hook wants to see more than that."""
        if self.place is None or any(self.place.hooks):
            return False
        for names, name, tensor in self._slots:  # noqa: SIM110 (a generator takes twice as long)
            if names.get(name) is not tensor:
                return False
        return True

    def versions(self) -> list[int]:
        """PyTorch's counters of what was written to the tensors, and whether they are trained."""
        return [2 * tensor._version + tensor.requires_grad for tensor in self.tensors]


class Checks:
    """Whether nothing has changed of what :meth:`Entry.look` found: the usual case, and a small part of its price.

    Args:
        found: the layers' adapters and their entries. Of those that cannot have a row nothing is known.

    Attributes:
        count: of the layers.
    """

    def __init__(self, found: Iterable[tuple[Member, Entry]]) -> None:
        # Adapters are not held here: one that is removed is to go.
        self._unusable: list[tuple[ReferenceType[Member], Entry]] = []
        self._weights: list[tuple[Tensor, int]] = []
        # Layers share networks, which are to be looked at once.
        hooks: dict[int, Mapping[Any, Any]] = {}
        slots: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
        tensors: dict[int, Tensor] = {}
        self.count = 0
        for member, entry in found:
            self.count += 1
            place = entry.place
            if place is None:
                self._unusable.append((ref(member), entry))
                continue
            weight = entry.tensors[-1]
            self._weights.append((weight, weight._version))
            hooks.update((id(names), names) for names in place.hooks)
            tensors.update((id(tensor), tensor) for tensor in entry.tensors)
            for names, name in (*place.slots, *place.others):
                slots[id(names), name] = names, name, names.get(name)
        self._hooks, self._slots = list(hooks.values()), list(slots.values())
        self._tensors = [(tensor, tensor.data_ptr()) for tensor in tensors.values()]

    def hold(self) -> bool:
        """Whether they do."""
        if any(self._hooks):
            return False
        for names, name, value in self._slots:
            if names.get(name) is not value:
                return False
        for tensor, address in self._tensors:
            if tensor.data_ptr() != address or not tensor.is_contiguous():
                return False
        for weight, version in self._weights:  # noqa: SIM110 (a generator takes twice as long)
            if weight._version != version:
                return False
        return True

    def look_again(self) -> bool:
        """Look at the layers that could not have a row; whether something has changed there."""
        members = [(reference(), entry) for reference, entry in self._unusable]
        changed = [entry.look(member) for member, entry in members if member is not None]
        return any(changed)


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
