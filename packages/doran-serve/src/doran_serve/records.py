"""Records of adapters as a server holds them: modules, factors, scales. Does not import vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from doran_core.checkpoint.binding import BoundModule

__all__ = ["AdapterForm", "AdapterInfo", "ServedAdapter", "ServedModule"]

AdapterForm = Literal["lora", "dora", "folded", "trainable"]


@dataclass(frozen=True)
class ServedModule:
    """One adapted layer: ``y = c * (W0 x + B A x) + bias``.

    Attributes:
        name: the module's name in the base model.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``, scaling included.
        scale: c, ``[d_out]`` float32; None for LoRA (all ones).
        stored_name: the module's name in the base checkpoint, from which vLLM derives its own.
    """

    name: str
    A: Tensor
    B: Tensor
    scale: Tensor | None
    stored_name: str


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter ready for a slot: checked, scaling baked in, networks evaluated.

    Attributes:
        path: its directory.
        form: the form of its files.
        modules: its linear layers, by name.
        stacks: the matrices of each stacked expert parameter, by the parameter's name; only in merged mode.
    """

    path: Path
    form: AdapterForm
    modules: Mapping[str, ServedModule]
    stacks: Mapping[str, Sequence[BoundModule]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(module.A.shape[0] for module in self.modules.values())


@dataclass(frozen=True)
class AdapterInfo:
    """The record of a checked adapter, without its tensors.

    Attributes:
        path: its directory.
        form: the form of its files.
        rank: the largest rank; None if only vLLM can read the adapter.
        modules: the number of adapted layers and stacked parameters.
        values: the number of values that a slot holds for this adapter.
        targets: last parts of these layers' names; empty if only vLLM can read the adapter.
        others: names of the layers that vLLM does not serve as linear ones.
        stacks: names of the stacked expert parameters.
        version: digest of the files, see `admission`; empty if they were checked without being admitted.
    """

    path: Path
    form: AdapterForm
    rank: int | None
    modules: int
    values: int
    targets: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    version: str = ""
