"""Bind an adapter to its checkpoint: find each module's weight on disk, and check sizes and base.

Merging and converting both start here. Weights are read in pieces of a few rows, so memory stays small.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from doran_core.adapter import AnyAdapter, PeftAdapter, TrainableAdapter
from doran_core.adapter.evaluate import LayerFactors, evaluate
from doran_core.adapter.schema import Kind
from doran_core.checkpoint.checkpoint import Checkpoint, WeightFile
from doran_core.checkpoint.fingerprint import combine_digests, sample_stride, samples_digest, weight_digest
from doran_core.checkpoint.full_tensors import by_base_names, without_copies
from doran_core.checkpoint.model_names import ModelNames
from doran_core.checkpoint.weight_layout import decide_kind, is_transposed, matrix_shape, to_matrix
from doran_core.errors import AdapterFormatError, BaseMismatchError, CheckpointError
from doran_core.files import StrPath
from doran_core.files.opening import named_errors
from doran_core.functional import merged_weight
from doran_core.method.factors import FactorBuilder

__all__ = ["BoundAdapter", "BoundModule", "bind", "checkpoint_fingerprint"]

CHUNK_ELEMENTS = 2**18
"""Elements of a weight per piece: 2 MiB in float64, about the size of a core's cache."""

_KNOWN_SCALE_TAU = 2.0**200
"""A power of two so large that in float64 ``n + tau = tau``: with it ``m = c tau`` gives exactly c."""

_MERGEABLE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class BoundModule:
    """One adapted module and its weight on disk.

    Attributes:
        factors: its evaluated factors.
        key: the tensor that the merge changes. For a tied weight, the checkpoint may lack this key.
        file: the weight's place on disk.
        kind: the layout of the stored weight.
        slot: the weight's index in a tensor that holds all experts; None if the weight is a tensor of its own.
    """

    factors: LayerFactors
    key: str
    file: WeightFile
    kind: Kind
    slot: int | None = None

    @property
    def name(self) -> str:
        """The module's name in the adapter."""
        return self.factors.name

    @property
    def parameter(self) -> str:
        """The weight's name in the model that was adapted."""
        return self.factors.stack or f"{self.name}.weight"

    @property
    def kernel(self) -> tuple[int, ...] | None:
        """``(in_channels, *kernel)`` of a convolution."""
        return self.file.entry.shape[1:] if self.kind in ("conv2d", "conv") else None

    def weight_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """The base weight as slices of rows of ``[d_out, d_in]`` with their values, in the dtype of the file.

        The values of one slice are overwritten by those of the next.
        """
        d_out, step = matrix_shape(self.file.entry.shape, self.kind)[0], self.slice_rows
        if not is_transposed(self.kind):
            for rows, values in self.file.rows(step):
                yield rows, to_matrix(values, self.kind)
            return
        whole = to_matrix(self.file.read(), self.kind)
        for start in range(0, d_out, step):
            rows = slice(start, min(start + step, d_out))
            yield rows, whole[rows]

    @property
    def slice_rows(self) -> int:
        """Rows of a slice of :meth:`weight_rows`, but for the last one."""
        d_out, d_in = matrix_shape(self.file.entry.shape, self.kind)
        return min(d_out, max(1, CHUNK_ELEMENTS // d_in))

    def double(self) -> BoundModule:
        """A copy with factors in float64, converted once instead of once per slice."""
        return replace(self, factors=self.factors.double())

    def merged_rows(self, weight: Tensor, rows: slice, *, out: Tensor | None = None) -> Tensor:
        """W' of some rows in float64.

        Args:
            weight: the base weight's rows, ``[rows, d_in]``.
            rows: their place in the whole weight.
            out: float64 memory of the same shape for the result; new memory by default.
        """
        layer = self.factors
        B = layer.B[rows]
        if layer.scale is not None:
            magnitude = layer.scale[rows].double() * _KNOWN_SCALE_TAU
            return merged_weight(weight, layer.A, B, layer.scaling, magnitude, _KNOWN_SCALE_TAU, out=out)
        assert layer.magnitude is not None
        tau = layer.tau[rows] if isinstance(layer.tau, Tensor) and layer.tau.numel() > 1 else layer.tau
        return merged_weight(weight, layer.A, B, layer.scaling, layer.magnitude[rows], tau, out=out)


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter and the checkpoint that it is bound to.

    Attributes:
        adapter: as it was read.
        checkpoint: the base.
        names: the model's parameters there.
        modules: the adapted modules there.
        extra: the tensors that replace base parameters in full, by the names that these have in the checkpoint, or that
            the checkpoint lacks, by their own names; without mere copies of base weights.
        adapter_extra: the same, all by the adapter's names.
        fingerprint: of the adapted weights in this checkpoint; computed only if the adapter records one.
    """

    adapter: AnyAdapter
    checkpoint: Checkpoint
    names: ModelNames
    modules: list[BoundModule]
    extra: dict[str, Tensor]
    adapter_extra: dict[str, Tensor]
    fingerprint: str | None


def bind(
    adapter: AnyAdapter,
    checkpoint: Checkpoint,
    where: StrPath,
    *,
    allow_base_mismatch: bool = False,
    factor_builder: FactorBuilder | None = None,
) -> BoundAdapter:
    """Find every adapted module in a checkpoint, and check that this is the adapter's base.

    Args:
        adapter: of any form.
        checkpoint: the base.
        where: the adapter's directory, for messages.
        allow_base_mismatch: accept another fingerprint.
        factor_builder: as in :func:`~doran_core.adapter.evaluate.evaluate`.

    Raises:
        AdapterFormatError: the adapter's generators do not fit, or need a builder.
        CheckpointError: a module or size that the checkpoint does not have, or an extra tensor whose place there is
            not clear.
        BaseMismatchError: other base weights; names both fingerprints.
    """
    with named_errors(where, AdapterFormatError):
        return _bind(adapter, checkpoint, where, allow_base_mismatch, factor_builder)


def _bind(
    adapter: AnyAdapter,
    checkpoint: Checkpoint,
    where: StrPath,
    allow_base_mismatch: bool,
    factor_builder: FactorBuilder | None,
) -> BoundAdapter:
    recorded = (None, None) if isinstance(adapter, PeftAdapter) else (adapter.ties, adapter.stored_names)
    names = ModelNames(checkpoint, *recorded)
    modules = list(_modules(adapter, names, checkpoint, str(where), factor_builder))
    expected = None if isinstance(adapter, PeftAdapter) else adapter.base_fingerprint
    found = checkpoint_fingerprint(modules) if expected is not None else None
    if found != expected and not allow_base_mismatch:
        half = any(module.file.entry.dtype == "F16" for module in modules)
        hint = " (it is float16: a rounded copy has another fingerprint than the original)" if half else ""
        raise BaseMismatchError(
            f"{where} was made for base weights with fingerprint {expected}, but {checkpoint.directory} has "
            f"{found}{hint}; pass allow_base_mismatch if you know that they fit"
        )
    ordinary = [module for module in modules if module.factors.stack is None]
    kept = without_copies(adapter.extra, names, {module.parameter: module.file for module in ordinary}, where)
    extra = by_base_names(kept, names, {module.parameter: module.file for module in ordinary}, where)
    _check_ties_known(names, checkpoint, ordinary, kept, where)
    return BoundAdapter(adapter, checkpoint, names, modules, extra, kept, found)


def _modules(
    adapter: AnyAdapter, names: ModelNames, checkpoint: Checkpoint, where: str, factor_builder: FactorBuilder | None
) -> Iterator[BoundModule]:
    places = _places(adapter, names)
    _check_distinct(places, where)
    _check_matrices((place.file for parts in places.values() for place in parts), where)
    columns = None
    if isinstance(adapter, TrainableAdapter):
        columns = {name: _columns(places, name, parts["magnitude"]) for name, parts in adapter.modules.items()}
    layers = evaluate(adapter, columns, factor_builder=factor_builder)
    transposed = _fan_in_fan_out(adapter)
    for layer in layers:
        parts = places[layer.name]
        for part, place in zip(_cut(layer, parts, where), parts, strict=True):
            file = place.file
            if file.entry.dtype not in _MERGEABLE:
                raise CheckpointError(
                    f"{file.path}: {file.entry.key}: dtype {file.entry.dtype}; adapters merge into {list(_MERGEABLE)}, "
                    "not into quantized weights"
                )
            name = f"{file.path}: {file.entry.key} (adapter {where})"
            kind = decide_kind(name, file.entry.shape, part.sizes, layer.kind, fan_in_fan_out=transposed)
            yield BoundModule(part, place.key, file, kind, place.slot)


class _Place(NamedTuple):
    """One tensor of a layer: its key, its place on disk, and its index if it is one matrix of a stacked tensor."""

    key: str
    file: WeightFile
    slot: int | None = None


def _places(adapter: AnyAdapter, names: ModelNames) -> dict[str, list[_Place]]:
    """The tensors of every layer by its name as evaluated; an expert of a stack may have several."""
    places: dict[str, list[_Place]] = {}
    for name, module in adapter.modules.items():
        experts = len(module["magnitude"]) if isinstance(module, dict) and module["magnitude"].dim() == 2 else None
        if experts is None:
            places[name] = [_Place(*names.locate(f"{name}.weight"))]
            continue
        assert isinstance(adapter, TrainableAdapter)
        is_one, found = names.locate_experts(name, adapter.stored_experts.get(name, []), experts)
        for expert, parts in enumerate(found):
            places[f"{name}[{expert}]"] = [_Place(*part, expert if is_one else None) for part in parts]
    return places


def _cut(layer: LayerFactors, parts: Sequence[_Place], where: str) -> list[LayerFactors]:
    """The layer's rows as its tensors hold them, one below the other.

    Raises:
        CheckpointError: the tensors have another number of rows together.
    """
    if len(parts) == 1:
        return [layer]
    ends = list(accumulate(place.file.entry.shape[0] for place in parts))
    if ends[-1] != layer.sizes[0]:
        keys = [place.key for place in parts]
        raise CheckpointError(f"{keys} have {ends[-1]} rows, {layer.name} of the adapter {where} has {layer.sizes[0]}")
    return [layer.rows(slice(start, end)) for start, end in zip([0, *ends], ends, strict=False)]


def _check_ties_known(
    names: ModelNames,
    checkpoint: Checkpoint,
    modules: Sequence[BoundModule],
    extra: Mapping[str, Tensor],
    where: StrPath,
) -> None:
    """Refuse to change an embedding or output layer if doran does not know whether the model ties them.

    Raises:
        CheckpointError: naming the parameter and the architecture.
    """
    config = checkpoint.config()
    if names.ties is not None or config.get("tie_word_embeddings") is False:
        return
    text = config.get("text_config")
    sizes = {part.get("vocab_size") for part in (config, text) if isinstance(part, Mapping)} - {None}
    touched = [m.parameter for m in modules if m.kind == "embedding" or m.file.entry.shape[0] in sizes]
    whole = [name for name, tensor in extra.items() if tensor.dim() == 2 and tensor.shape[0] in sizes]
    if touched or len(whole) == 1:
        raise CheckpointError(
            f"{where}: changes {(touched or whole)[0]}, which may be tied to another weight. The adapter does not say, "
            f"and doran does not know the architecture {config.get('architectures')}. Save the adapter again with its "
            f"model, or set tie_word_embeddings to false in {checkpoint.directory}'s config.json if nothing is tied"
        )


def _fan_in_fan_out(adapter: AnyAdapter) -> bool:
    if isinstance(adapter, PeftAdapter):
        return adapter.fan_in_fan_out
    return isinstance(adapter, TrainableAdapter) and bool(adapter.peft_fields.get("fan_in_fan_out"))


def _columns(places: Mapping[str, Sequence[_Place]], name: str, magnitude: Tensor) -> int:
    """d_in of a module by its weight's shape and its d_out; wrong sizes are found later, with a better message."""
    parts = places.get(name) or places[f"{name}[0]"]
    sizes = matrix_shape(parts[0].file.entry.shape, "linear")
    return sizes[1] if len(parts) > 1 or sizes[0] == magnitude.shape[-1] else sizes[0]


def _check_distinct(places: Mapping[str, Sequence[_Place]], where: str) -> None:
    """Refuse two modules with one weight."""
    owners: dict[tuple[str, int | None], str] = {}
    for module, parts in places.items():
        for place in parts:
            owner = owners.setdefault((place.key, place.slot), module)
            if owner != module:
                raise CheckpointError(f"{where}: {owner} and {module} would both adapt {place.key}")


def _check_matrices(weights: Iterable[WeightFile], where: str) -> None:
    """Refuse weights that are empty or cannot be seen as a matrix."""
    for file in weights:
        shape = file.entry.shape
        if len(shape) < 2 or 0 in shape:
            key = file.entry.key
            raise CheckpointError(f"{file.path}: {key} (adapter {where}): shape {list(shape)} is no weight to adapt")


def checkpoint_fingerprint(modules: list[BoundModule]) -> str:
    """The fingerprint of the modules' weights. Reads only the sampled values of each file."""
    weights: dict[str, list[BoundModule]] = {}  # the parts of a stack count as one, one below the other
    for module in modules:
        weights.setdefault(module.factors.stack or module.name, []).append(module)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return combine_digests(zip(weights, pool.map(_digest, weights, weights.values()), strict=True))


def _digest(name: str, parts: list[BoundModule]) -> bytes:
    sizes = [matrix_shape(part.file.entry.shape, part.kind) for part in parts]
    if len(parts) == 1 and is_transposed(parts[0].kind):
        return weight_digest(name, to_matrix(parts[0].file.read(), parts[0].kind))
    shape = sum(rows for rows, _ in sizes), sizes[0][1]
    stride, samples, start = sample_stride(*shape), [], 0
    for part, (rows_of_part, columns) in zip(parts, sizes, strict=True):
        for rows, weight in part.weight_rows():
            samples.append(weight.flatten()[-(start + rows.start) * columns % stride :: stride].clone())
        start += rows_of_part
    return samples_digest(name, shape, torch.cat(samples))
