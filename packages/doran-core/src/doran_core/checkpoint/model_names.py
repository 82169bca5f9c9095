"""Finds each parameter of the adapted model in a checkpoint, also if it is renamed, tied or stacked there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from doran_core.checkpoint.architectures import known_ties, stored_candidates
from doran_core.checkpoint.checkpoint import Checkpoint, WeightFile
from doran_core.errors import CheckpointError

__all__ = ["ModelNames", "TiedGroup"]


@dataclass(frozen=True)
class TiedGroup:
    """Tied parameters: one tensor with several names in the model.

    Attributes:
        file: the checkpoint's tensor for all of them, also for names that the checkpoint lacks.
        keys: by name in the model, the name in the checkpoint, which may lack some of them.
    """

    file: WeightFile
    keys: dict[str, str]


class ModelNames:
    """The names of a model's parameters in a checkpoint.

    Args:
        checkpoint: the base.
        ties: each tied parameter and its source, by the model's names, as an adapter records them; None to take them
            from the table of architectures.
        stored_names: names in a checkpoint by those in the model, likewise.

    Attributes:
        ties: as given, or by the table; None if neither knows.
        groups: the tied parameters of which the checkpoint has at least one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ties: Mapping[str, str] | None = None,
        stored_names: Mapping[str, str] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config()  # read once, not for each name
        self._stored = stored_names or {}
        self.ties = known_ties(self._config) if ties is None else ties
        self.groups = [group for members in _members(self.ties or {}) if (group := self._group(members)) is not None]
        self._by_parameter = {name: group for group in self.groups for name in group.keys}

    @property
    def directory(self) -> Path:
        """The checkpoint's."""
        return self._checkpoint.directory

    def __contains__(self, key: str) -> bool:
        """Whether the checkpoint has a tensor of this name."""
        return key in self._checkpoint

    def locate(self, parameter: str) -> tuple[str, WeightFile]:
        """A parameter's name in the checkpoint, and the tensor with its values; a tied parameter may have its source's.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or more than one that could be meant.
        """
        group = self._by_parameter.get(parameter)
        if group is not None:
            key = group.keys[parameter]
            return key, self._checkpoint.file(key) if key in self._checkpoint else group.file
        key = self._key(parameter)
        return key, self._checkpoint.file(key)

    def locate_experts(
        self, parameter: str, patterns: Sequence[str], experts: int
    ) -> tuple[bool, list[list[tuple[str, WeightFile]]]]:
        """Where the matrices of a stacked parameter are: in one tensor, or in tensors of their own.

        Args:
            parameter: its name in the model.
            patterns: names of one expert's tensors, with ``{}`` for the expert's number. Their rows follow each other.
            experts: the number of experts.

        Returns:
            Whether it is one tensor, and for each expert the names and places of its parts.

        Raises:
            CheckpointError: the checkpoint has neither, or another number of experts.
        """
        first = [pattern.replace("{}", "0") for pattern in patterns[:1]]
        if any(name in self._checkpoint or self._checkpoint.similar(name) for name in first):
            names = [[pattern.replace("{}", str(expert)) for pattern in patterns] for expert in range(experts)]
            return False, [[self.locate(name) for name in own] for own in names]
        key, file = self.locate(parameter)
        shape = file.entry.shape
        if len(shape) != 3 or shape[0] != experts:
            raise CheckpointError(
                f"{file.path}: {key} has shape {list(shape)}, the adapter has {experts} experts, so expected "
                f"[{experts}, rows, columns]"
            )
        return True, [[(key, part)] for part in file.parts()]

    def nominal(self, parameter: str) -> str:
        """The name that a checkpoint of the whole model has for a parameter."""
        return next(iter(self._candidates(parameter)))

    def is_tied(self, parameter: str) -> bool:
        """Whether a parameter is tied to another, as far as known."""
        return parameter in self._by_parameter

    def _key(self, parameter: str) -> str:
        for name in self._candidates(parameter):
            if name in self._checkpoint:
                return name
        for name in self._candidates(parameter):
            found = self._checkpoint.similar(name)
            if len(found) > 1:
                raise CheckpointError(f"{self._checkpoint.directory}: {name!r} could be any of {found}")
            if found:
                return found[0]
        return self._checkpoint.file(parameter).entry.key  # which raises, naming the nearest

    def _candidates(self, parameter: str) -> Iterable[str]:
        recorded = [self._stored[parameter]] if parameter in self._stored else []
        return dict.fromkeys([*recorded, *stored_candidates(self._config, parameter), parameter])

    def _group(self, members: list[str]) -> TiedGroup | None:
        """The group of these parameters, the source first; None if the checkpoint has none of them."""
        present = {name: key for name in members for key in self._candidates(name) if key in self._checkpoint}
        if not present:  # maybe the checkpoint of a part of the model
            found = {name: self._checkpoint.similar(key) for name in members[:1] for key in self._candidates(name)}
            present = {name: keys[0] for name, keys in found.items() if len(keys) == 1}
        if not present:
            return None
        first = next(name for name in members if name in present)
        keys = {name: present.get(name, self.nominal(name)) for name in members}
        return TiedGroup(self._checkpoint.file(present[first]), keys)


def _members(ties: Mapping[str, str]) -> Iterable[list[str]]:
    """Groups of tied parameters, the source first."""
    groups: dict[str, list[str]] = {}
    for tied, source in ties.items():
        seen = {tied}
        while source in ties and source not in seen:  # a source that is tied itself
            seen.add(source)
            source = ties[source]
        groups.setdefault(source, [source]).append(tied)
    return groups.values()
