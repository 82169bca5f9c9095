"""The plan of a merge: for every output shard, its header and the source of each tensor's bytes.

Planning reads headers only. If a shard keeps its keys, dtypes and shapes, its header stays the same to the byte.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from doran_core.checkpoint.binding import BoundAdapter, BoundModule
from doran_core.checkpoint.checkpoint import Checkpoint, WeightFile, open_for_reading
from doran_core.checkpoint.full_tensors import extra_keys
from doran_core.checkpoint.model_names import ModelNames
from doran_core.checkpoint.ties import FLAG_IN_FORWARD
from doran_core.errors import CheckpointError, ConfigError
from doran_core.files.layout import DTYPES, Layout, TensorEntry, compose_header, dtype_name

__all__ = ["Content", "Copied", "Given", "MergePlan", "Merged", "MergedExperts", "ShardPlan", "make_plan"]

_CONVERTIBLE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Copied:
    """The bytes of a base tensor, converted if the output has another dtype."""

    file: WeightFile


@dataclass(frozen=True)
class Merged:
    """A base tensor with adapters, each with its weight, merged into it."""

    updates: tuple[tuple[float, BoundModule], ...]


@dataclass(frozen=True)
class MergedExperts:
    """A base tensor that holds all experts, with adapters merged into each of its matrices, in their order."""

    experts: tuple[Merged, ...]


@dataclass(frozen=True)
class Given:
    """A tensor from an adapter, in full."""

    tensor: Tensor


Content = Copied | Merged | MergedExperts | Given


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its name, the bytes before its tensors, and its tensors in file order."""

    name: str
    header: bytes
    tensors: list[tuple[TensorEntry, Content]]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(entry.nbytes for entry, _ in self.tensors)


@dataclass(frozen=True)
class MergePlan:
    """All output shards, and whether the merge unties the output layer and the input embedding."""

    shards: list[ShardPlan]
    untied: bool
    keys_changed: bool
    """Whether keys, shard sizes or dtypes differ from the base's, so that the index must be rewritten."""


def make_plan(
    checkpoint: Checkpoint, adapters: Sequence[tuple[float, BoundAdapter]], dtype: torch.dtype | None
) -> MergePlan:
    """Plan the merge of adapters, each with its weight, into a checkpoint.

    Raises:
        CheckpointError: an extra tensor has another shape than the tensor that it replaces.
        ConfigError: adapters that contradict each other.
    """
    merged = _merged_tensors(adapters)
    replaced, added = _extra_tensors(checkpoint, adapters, merged)
    contents: dict[str, Content] = {key: Copied(checkpoint.file(key)) for key in checkpoint}
    contents.update({key: Given(tensor) for key, tensor in replaced.items()})
    contents.update(merged)
    contents.update({key: Given(tensor) for key, tensor in added.items()})
    names = [bound.names for _, bound in adapters]
    untied = _untie(checkpoint, next((n for n in names if n.ties is not None), names[0]), contents)
    prefix = _lacking_prefix(adapters) if added else ""
    shards, changed = _shards(checkpoint, contents, prefix, dtype)
    return MergePlan(shards, untied, changed)


def _merged_tensors(adapters: Sequence[tuple[float, BoundAdapter]]) -> dict[str, Merged | MergedExperts]:
    found: dict[str, dict[int | None, list[tuple[float, BoundModule]]]] = {}
    for weight, adapter in adapters:
        for module in adapter.modules:
            updates = found.setdefault(module.key, {}).setdefault(module.slot, [])
            if updates and updates[0][1].kind != module.kind:
                raise ConfigError(f"{module.key}: one adapter takes it as {updates[0][1].kind}, one as {module.kind}")
            updates.append((weight, module))
    return {
        key: Merged(tuple(slots[None])) if None in slots else MergedExperts(tuple(map(_merged, slots.values())))
        for key, slots in found.items()
    }


def _merged(updates: Sequence[tuple[float, BoundModule]]) -> Merged:
    return Merged(tuple(updates))


def _parts(entry: TensorEntry, content: Content) -> list[tuple[TensorEntry, Content]]:
    """A tensor and where its bytes come from; of one with all experts, each matrix by itself."""
    if not isinstance(content, MergedExperts):
        return [(entry, content)]
    size = entry.nbytes // entry.shape[0]
    return [
        (replace(entry, shape=entry.shape[1:], start=entry.start + size * i, stop=entry.start + size * (i + 1)), expert)
        for i, expert in enumerate(content.experts)
    ]


def _extra_tensors(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[float, BoundAdapter]],
    merged: Mapping[str, object],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Full tensors that replace a base tensor, and full tensors that the base lacks."""
    replaced: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for weight, bound in adapters:
        places = extra_keys(bound.extra, checkpoint)
        for name, tensor in bound.extra.items():
            key = places.get(name, name)
            if key in merged:
                raise ConfigError(f"{name}: one adapter replaces it in full and another one adapts it")
            target = replaced if name in places else added
            if key in target and not torch.equal(target[key], tensor):
                raise ConfigError(f"{name}: two adapters replace it in full, with different values")
            if weight != 1.0:
                raise ConfigError(f"{name}: the adapter replaces it in full; that takes weight 1, got {weight}")
            if name in places and tuple(tensor.shape) != checkpoint.shape(key):
                raise CheckpointError(
                    f"{checkpoint.file(key).path}: {key} has shape {list(checkpoint.shape(key))}, the adapter "
                    f"replaces it by one of shape {list(tensor.shape)}; resize the base first"
                )
            if name in places and checkpoint.file(key).entry.dtype not in DTYPES:
                raise CheckpointError(
                    f"{checkpoint.file(key).path}: {key} has dtype {checkpoint.file(key).entry.dtype}, in which the "
                    "adapter's values cannot be written"
                )
            target[key] = tensor
    return replaced, added


def _untie(checkpoint: Checkpoint, names: ModelNames, contents: dict[str, Content]) -> bool:
    """Give tied weights separate tensors if the merge changes only one end of the tie.

    Clearing ``tie_word_embeddings`` unties every group, so every group then needs separate tensors. In models whose
    outputs depend on the flag, the flag stays, and transformers unties the groups that differ: only those need tensors.

    Returns:
        Whether the flag is to be cleared.
    """

    def is_changed(key: str) -> bool:
        return isinstance(contents.get(key), Merged | MergedExperts | Given)

    broken = [group for group in names.groups if any(map(is_changed, group.keys.values()))]
    keeps_flag = checkpoint.config().get("model_type") in FLAG_IN_FORWARD
    for group in broken if keeps_flag else names.groups if broken else []:
        for key in group.keys.values():
            contents.setdefault(key, Copied(group.file))
    return bool(broken) and not keeps_flag


def _lacking_prefix(adapters: Sequence[tuple[float, BoundAdapter]]) -> str:
    """The prefix, such as "bert.", that the adapted model's names have and the base checkpoint's lack; or ""."""
    names = {adapter.names.nominal(m.parameter): m.key for _, adapter in adapters for m in adapter.modules}
    prefixes = {name.removesuffix(key) for name, key in names.items() if name.endswith(f".{key}")}
    return prefixes.pop() if len(prefixes) == 1 else ""


def _shards(
    checkpoint: Checkpoint,
    contents: Mapping[str, Content],
    prefix: str,
    dtype: torch.dtype | None,
) -> tuple[list[ShardPlan], bool]:
    usual = _usual_dtype(checkpoint)
    new_keys = [key for key in contents if key not in checkpoint]
    shards, changed = [], bool(prefix)
    for number, layout in enumerate(checkpoint.shards):
        keys = list(layout.entries) + (new_keys if number == len(checkpoint.shards) - 1 else [])
        outputs = {}
        for key in keys:
            name = prefix + key if key in checkpoint else key
            outputs[name] = _describe(key, layout.entries.get(key), contents[key], usual, dtype)
        same = outputs == {key: (key, entry.dtype, entry.shape) for key, entry in layout.entries.items()}
        changed = changed or not same
        shards.append(_keep_layout(layout, contents) if same else _new_layout(layout, outputs, contents))
    return shards, changed


def _usual_dtype(checkpoint: Checkpoint) -> str:
    """The floating dtype of most tensors. Tensors that the base lacks are stored in it."""
    entries = (entry for layout in checkpoint.shards for entry in layout.entries.values())
    counts = Counter(entry.dtype for entry in entries if entry.dtype in _CONVERTIBLE)
    return counts.most_common(1)[0][0] if counts else "F32"


def _describe(
    key: str, entry: TensorEntry | None, content: Content, usual: str, dtype: torch.dtype | None
) -> tuple[str, str, tuple[int, ...]]:
    """Base key, dtype and shape of an output tensor."""
    if entry is not None:
        name, shape = entry.dtype, entry.shape
    elif isinstance(content, Given):
        name, shape = usual, tuple(content.tensor.shape)
    else:
        assert not isinstance(content, MergedExperts)  # no stack is a tied parameter that the base lacks
        source = content.file if isinstance(content, Copied) else content.updates[0][1].file
        name, shape = source.entry.dtype, source.entry.shape
    if dtype is not None and name in _CONVERTIBLE:
        name = dtype_name(dtype)
    return key, name, shape


def _keep_layout(layout: Layout, contents: Mapping[str, Content]) -> ShardPlan:
    with open_for_reading(layout.path) as fd:
        header = os.pread(fd, layout.header_bytes, 0)
    placed = (part for key, entry in layout.entries.items() for part in _parts(entry, contents[key]))
    return ShardPlan(layout.path.name, header, list(placed))


def _new_layout(
    layout: Layout,
    outputs: Mapping[str, tuple[str, str, tuple[int, ...]]],
    contents: Mapping[str, Content],
) -> ShardPlan:
    tensors = []
    for name, (key, dtype, shape) in outputs.items():
        entry = layout.entries.get(key)
        if dtype in DTYPES:
            nbytes = DTYPES[dtype].itemsize * int(torch.Size(shape).numel())
        else:
            assert entry is not None  # only a copied tensor can have a dtype that torch lacks
            nbytes = entry.nbytes
        tensors.append((name, dtype, shape, nbytes))
    header, entries = compose_header(tensors, layout.metadata)
    placed = (part for name, entry in entries.items() for part in _parts(entry, contents[outputs[name][0]]))
    return ShardPlan(layout.path.name, header, list(placed))
