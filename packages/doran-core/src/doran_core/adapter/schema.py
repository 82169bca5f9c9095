"""The contents of an adapter directory as plain records: file names, keys, and the three forms of an adapter.

Records do not validate themselves: :mod:`doran_core.adapter.validate` does, on reading and before writing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from torch import Tensor

from doran_core.method.config import DoranConfig

__all__ = [
    "ADAPTER_FILES",
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "KEY_PREFIX",
    "SCALE_FILE",
    "TENSOR_FILE",
    "AnyAdapter",
    "FoldedAdapter",
    "FoldedModule",
    "Kind",
    "PeftAdapter",
    "PeftModule",
    "TrainableAdapter",
    "created_by",
]

FORMAT_VERSION = 2
"""Version 1 has no digests, ties and stored names. Readers accept both versions; writers write this one."""
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
SCALE_FILE = "doran_scale.safetensors"
ADAPTER_FILES = (CONFIG_FILE, TENSOR_FILE, SCALE_FILE, "adapter_model.bin")
"""Files that belong to an adapter; writing one replaces them and no others."""
KEY_PREFIX = "base_model.model."
"""PEFT's prefix of every key. Writers add it; readers do not require it."""

Kind = Literal["linear", "conv1d", "conv2d", "conv", "embedding"]
"""How a module keeps its weight. In matrix terms ``[d_out, d_in]``: linear as it is; conv1d (GPT-2) and embedding
transposed; conv2d as ``[d_out, in, kh, kw]`` with ``d_in = in * kh * kw``, in being the input channels of one group;
conv (nn.Conv1d and Conv3d) likewise with one or three sizes of the kernel."""


def created_by() -> str:
    """Name and version of this package, for the files that it writes."""
    try:
        return f"doran-core {version('doran-core')}"
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "doran-core"


@dataclass(frozen=True)
class FoldedModule:
    """One adapted layer with its networks evaluated: ``y = c * (W0 x + B A x) + bias``.

    Attributes:
        name: the module's name in the base model.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``, the scaling g included.
        scale: c, ``[d_out]``, float32.
        magnitude: ``m' = c ||W0 + B A||``, ``[d_out]``: the magnitude of the equal DoRA adapter.
        kind: how the base keeps the weight.
        kernel: ``(in_channels, kh, kw)`` of a conv2d, else None.
        zero_rows: rows in which ``W0 + B A`` is 0. DoRA divides by their norm, so a file cannot hold them.
    """

    name: str
    A: Tensor
    B: Tensor
    scale: Tensor
    magnitude: Tensor
    kind: Kind = "linear"
    kernel: tuple[int, ...] | None = None
    zero_rows: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]


@dataclass(frozen=True)
class FoldedAdapter:
    """The folded form: the same function as the trainable one, the size of a LoRA.

    Attributes:
        modules: by module name.
        extra: tensors that replace base parameters in full (a classifier head, say), by the parameter's name.
        base_fingerprint: of the weights that the adapter was made for; None if unknown.
        base_model: name or path of the base model, as a hint for people.
        task_type: PEFT's task type, e.g. "CAUSAL_LM".
        modules_to_save: names of the modules that `extra` belongs to.
        ties: of the whole base model: each tied parameter's source, by the model's names; {} if none are, None if
            unknown.
        stored_names: names in a checkpoint of the parameters that have other names there; None if unknown.
        created_by: the program that wrote the adapter.
        digest: of the files that it was read from, or None. Writers compute a new one.
    """

    modules: dict[str, FoldedModule]
    extra: dict[str, Tensor] = field(default_factory=dict)
    base_fingerprint: str | None = None
    base_model: str | None = None
    task_type: str | None = None
    modules_to_save: list[str] | None = None
    ties: Mapping[str, str] | None = None
    stored_names: Mapping[str, str] | None = None
    created_by: str = field(default_factory=created_by)
    digest: str | None = None


@dataclass(frozen=True)
class TrainableAdapter:
    """The trainable form: the tensors of each module's DoranAdapter.

    Attributes:
        config: the method's options.
        modules: for each module name its tensors by their names in DoranAdapter ("magnitude", "tau.raw", ...).
        extra, base_fingerprint, base_model, task_type, ties, stored_names, created_by, digest: as in
            :class:`FoldedAdapter`.
        module_kinds: kinds of the modules that are not linear.
        stored_experts: for stacked expert weights of which a checkpoint holds one matrix per expert: the names of these
            matrices, with ``{}`` for the expert's number. Several names: each matrix holds a part of the expert's rows,
            in this order.
        peft_fields: PEFT's own fields of adapter_config.json, kept as they are.
    """

    config: DoranConfig
    modules: dict[str, dict[str, Tensor]]
    extra: dict[str, Tensor] = field(default_factory=dict)
    base_fingerprint: str | None = None
    base_model: str | None = None
    task_type: str | None = None
    module_kinds: Mapping[str, Kind] = field(default_factory=dict)
    peft_fields: Mapping[str, Any] = field(default_factory=dict)
    ties: Mapping[str, str] | None = None
    stored_names: Mapping[str, str] | None = None
    stored_experts: Mapping[str, list[str]] = field(default_factory=dict)
    created_by: str = field(default_factory=created_by)
    digest: str | None = None


@dataclass(frozen=True)
class PeftModule:
    """One layer of a PEFT LoRA or DoRA adapter, as stored.

    Attributes:
        name: the module's name in the base model.
        A: ``[r, d_in]``, convolutions flattened.
        B: ``[d_out, r]``, the scaling not included.
        scaling: g.
        magnitude: DoRA's m, ``[d_out]``; None for LoRA.
        kind: None if the file does not record it (PEFT does not mark Conv1D). Then the base weight's shape decides.
        kernel: ``(in_channels, kh, kw)`` of a conv2d, else None.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None
    kind: Kind | None = None
    kernel: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA or DoRA adapter that PEFT wrote.

    Attributes:
        modules: by module name.
        config: adapter_config.json.
        extra, base_model, task_type, digest: as in :class:`FoldedAdapter`; PEFT's own files have no digest.
        fan_in_fan_out: PEFT's flag; settles the layout of square weights.
    """

    modules: dict[str, PeftModule]
    config: Mapping[str, Any]
    extra: dict[str, Tensor] = field(default_factory=dict)
    base_model: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    digest: str | None = None


AnyAdapter = TrainableAdapter | FoldedAdapter | PeftAdapter
