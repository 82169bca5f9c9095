"""Adapters kept apart from the base: folded against it, checked against the model, merged for the proof only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from doran_core.adapter import FoldedAdapter, FoldedModule
from doran_core.convert import fold_adapter
from doran_core.errors import ConfigError
from doran_core.functional import adapted_output, direction, scaled_factor
from doran_export.errors import ExportError, UnsupportedModelError

__all__ = [
    "PARTS",
    "adapter_tensors",
    "fold_adapters",
    "merged_weights",
    "replaced",
    "switched_weights",
    "union_of_targets",
]

PARTS = ("lora_A", "lora_B", "scale")
"""Inputs of each adapted layer: A transposed ``[d_in, r]``, B' transposed ``[r, d_out]``, c ``[d_out]``."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def fold_adapters(adapters: Mapping[str, str | Path], base: Path) -> dict[str, FoldedAdapter]:
    """Fold adapter directories of any form against their base.

    Args:
        adapters: directories by name. Users switch by these names, and each becomes a file name.
        base: the base model's directory.

    Raises:
        AdapterFormatError, BaseMismatchError, CheckpointError: an adapter is not valid or not for this base.
        ConfigError: no adapter, or a name that is no file name.
        UnsupportedModelError: an adapter replaces whole tensors, which graph inputs cannot express.
    """
    if not adapters:
        raise ConfigError("no adapter was given: expected at least one, by name")
    folded = {}
    for name, directory in adapters.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"adapter name {name!r}: expected letters, digits, '.', '_' and '-'")
        folded[name] = fold_adapter(directory, base)
        if folded[name].extra:
            raise UnsupportedModelError(
                f"adapter {name} ({directory}) replaces {sorted(folded[name].extra)[0]} in full, which adapters of "
                "one graph cannot: merge it and export it alone"
            )
    return folded


def union_of_targets(model: PreTrainedModel, adapters: Mapping[str, FoldedAdapter]) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every layer that some adapter changes, by module name in the model's order.

    Raises:
        UnsupportedModelError: a layer is not in the exported model, or is not linear.
    """
    modules = dict(model.named_modules())
    for name, adapter in adapters.items():
        for part in adapter.modules.values():
            module = modules.get(part.name)
            if not isinstance(module, nn.Linear | Conv1D):
                found = "which this model does not have" if module is None else f"a {type(module).__name__}"
                raise UnsupportedModelError(
                    f"adapter {name} changes {part.name}, {found}: expected linear layers of {type(model).__name__}"
                )
    targets = {part for adapter in adapters.values() for part in adapter.modules}
    return {name: _sizes(module) for name, module in modules.items() if name in targets}


def _sizes(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Linear | Conv1D)
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def adapter_tensors(adapter: FoldedAdapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """An adapter's graph inputs, by name ``{module}.{part}``. c stays in float32, because it is near 1."""
    tensors = {}
    for name, part in adapter.modules.items():
        tensors[f"{name}.lora_A"] = part.A.T.to(dtype).contiguous()
        tensors[f"{name}.lora_B"] = scaled_factor(part.B, part.scale, 1.0).T.to(dtype).contiguous()
        tensors[f"{name}.scale"] = part.scale.float()
    return tensors


def merged_weights(model: PreTrainedModel, adapter: FoldedAdapter) -> dict[str, Tensor]:
    """W' = c (W0 + B A) of every layer that an adapter changes, by module name, in the module's layout and dtype."""

    def merge(base: Tensor, part: FoldedModule) -> Tensor:
        return direction(base, part.A.double(), part.B.double(), 1.0).mul_(part.scale.double()[:, None])

    parts = adapter.modules.values()
    return {part.name: _in_layout(model, part.name, partial(merge, part=part)) for part in parts}


def switched_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W' = c W0 + B' A from the graph inputs in an adapter's file.

    Raises:
        ExportError: the model has no such layer, or one of another size.
    """

    def merge(base: Tensor, name: str) -> Tensor:
        A, B, scale = (tensors[f"{name}.{part}"].double() for part in PARTS)
        return adapted_output(base.T, A @ B, scale).T

    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    try:
        return {name: _in_layout(model, name, partial(merge, name=name)) for name in names}
    except (AttributeError, KeyError, RuntimeError) as error:
        raise ExportError(f"an adapter does not fit {type(model).__name__}: {error}") from error


@contextmanager
def replaced(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which the named modules have these weights.

    Each layer gets a new Parameter, so layers tied to its old weight keep that weight.
    """
    modules = {name: model.get_submodule(name) for name in weights}
    before = {name: module.weight for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight = nn.Parameter(weights[name], requires_grad=False)
        yield
    finally:
        for name, module in modules.items():
            module.weight = before[name]


def _in_layout(model: PreTrainedModel, name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to a layer's weight ``[d_out, d_in]`` in float64; return the result in the layer's layout and
    dtype."""
    module = model.get_submodule(name)
    assert isinstance(module.weight, Tensor)
    transposed = isinstance(module, Conv1D)
    weight = module.weight.detach()
    result = change((weight.T if transposed else weight).double())
    return (result.T if transposed else result).to(weight.dtype).contiguous()
