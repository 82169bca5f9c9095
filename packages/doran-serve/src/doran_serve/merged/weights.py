"""Swaps the base's weights for adapted ones, computed on the device: `W' = c (W0 + B A)` in float64, rounded once.

The weights equal those that `doran merge` writes for the folded adapter. The base rows of every changed projection are
kept once: on the device if they fit beside the engine, else in host memory. `experts` swaps stacked expert weights.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from doran_core.errors import AdapterFormatError, TargetError, TensorShapeError
from doran_core.functional import direction
from doran_serve.layer_map import Place, nearest, place_name, places_of, renamer
from doran_serve.merged.experts import ExpertWeights
from doran_serve.records import ServedAdapter, ServedModule
from doran_serve.store import AdapterStore
from doran_serve.vllm_symbols import lookup

__all__ = ["MergedWeights", "forget_weights", "swap_weights"]

_READY = 4
"""Adapters kept in host memory, so that switching between a few reads no files."""
_PIECE = 2**23
"""Elements of a weight in float64 at a time."""
_SPARE = 2**30
"""Bytes of device memory that base rows leave free."""


class MergedWeights:
    """The adaptable weights of one worker's model.

    Args:
        model: vLLM's, without LoRA layers.
        store: reads adapters.
        partial: the model has only some of the layers (pipeline parallelism).
    """

    def __init__(self, model: torch.nn.Module, store: AdapterStore, *, partial: bool = False) -> None:
        self._store = store
        self._partial = partial
        self._places = places_of(model, lookup("LinearBase"))
        self._rename = renamer(model, lookup("parse_fine_tuned_lora_name"))
        self._base: dict[str, Tensor] = {}
        self._adapted: set[str] = set()
        self._ready: OrderedDict[str, tuple[ServedAdapter, dict[str, ServedModule]]] = OrderedDict()
        self._experts = ExpertWeights(model, _kept, partial=partial)

    @torch.no_grad()
    def swap(self, path: str | None) -> float:
        """Swap in the adapter at `path`, from `admission.marked`, or the base model for None.

        Returns:
            The duration in seconds.

        Raises:
            DoranError: the adapter cannot be read or does not fit, and nothing has changed. Or a merged expert weight
                is not finite, and the next swap repairs what has changed.
        """
        start = time.perf_counter()
        adapter, wanted = (None, {}) if path is None else self._read(path)
        stacks = {} if adapter is None else adapter.stacks
        if stacks:
            self._require_base_files()
            self._experts.check(stacks)
        for name in self._adapted - wanted.keys():
            place = self._places[name]
            place.layer.weight.data[place.rows].copy_(self._base[name])
        # Until the swap is done, these projections may differ from the base.
        self._adapted |= wanted.keys()
        for name, module in wanted.items():
            self._write(name, module)
        self._adapted = set(wanted)
        self._experts.swap(stacks)
        if stacks:
            self._require_base_files()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    def _require_base_files(self) -> None:
        """Refuse base files that have changed since they were read first: expert weights are merged from them."""
        checkpoint = self._store.base.checkpoint
        assert checkpoint is not None  # without it no adapter of experts can be read
        checkpoint.require_unchanged()

    def _read(self, path: str) -> tuple[ServedAdapter, dict[str, ServedModule]]:
        """The adapter, and its linear layers by place; read from files if they are not in memory."""
        if path in self._ready:
            self._ready.move_to_end(path)
            return self._ready[path]
        adapter, _ = self._store.load_admitted(path)
        if adapter is None:
            raise AdapterFormatError(f"{path}: adapts more than linear layers; merged mode cannot swap it")
        modules: dict[str, ServedModule] = {}
        for module in adapter.modules.values():
            name = place_name(module, self._rename, self._places)
            if name not in self._places:
                if self._partial:
                    continue
                raise TargetError(
                    f"{path}: {module.name}: the served model has no adaptable layer of this name"
                    + nearest(name, self._places)
                )
            expected = self._places[name].shape
            if (module.B.shape[0], module.A.shape[1]) != expected:
                raise TensorShapeError(
                    f"{path}: {module.name}: adapts a weight of shape {[module.B.shape[0], module.A.shape[1]]}, "
                    f"but the served layer's is {list(expected)}"
                )
            modules[name] = _pinned(module)
        self._ready[path] = adapter, modules
        while len(self._ready) > _READY:
            self._ready.popitem(last=False)
        return self._ready[path]

    def _write(self, name: str, module: ServedModule) -> None:
        place = self._places[name]
        weight = place.layer.weight.data[place.rows]
        base = self._base_rows(name, place).to(weight.device, non_blocking=True)
        A, B, c = (
            None if part is None else part.to(weight.device, non_blocking=True).double()
            for part in (module.A[:, place.inputs], module.B[place.outputs], _part(module.scale, place.outputs))
        )
        assert A is not None
        assert B is not None
        step = max(1, _PIECE // weight.shape[1])
        for first in range(0, weight.shape[0], step):
            rows = slice(first, first + step)
            adapted = direction(base[rows].double(), A, B[rows], 1.0)
            weight[rows].copy_(adapted if c is None else adapted.mul_(c[rows, None]))

    def _base_rows(self, name: str, place: Place) -> Tensor:
        if name not in self._base:
            self._base[name] = _kept(place.layer.weight.data[place.rows])
        return self._base[name]


def _kept(rows: Tensor) -> Tensor:
    """A copy of base weights: on their device if it has room, else in pinned host memory."""
    needed = _SPARE + rows.numel() * rows.element_size()
    spare = rows.device.type != "cuda" or torch.cuda.mem_get_info(rows.device)[0] > needed
    return rows.clone() if spare else rows.cpu().pin_memory()


def _part(scale: Tensor | None, rows: slice) -> Tensor | None:
    return None if scale is None else scale[rows]


def _pinned(module: ServedModule) -> ServedModule:
    """The module in pinned memory if there is a device to copy it to."""
    if not torch.cuda.is_available():
        return module
    scale = None if module.scale is None else module.scale.pin_memory()
    A, B = module.A.contiguous().pin_memory(), module.B.contiguous().pin_memory()
    return replace(module, A=A, B=B, scale=scale)


_of_model: weakref.WeakKeyDictionary[torch.nn.Module, MergedWeights] = weakref.WeakKeyDictionary()


def swap_weights(worker: Any, path: str | None) -> float:
    """Swap the weights of a vLLM worker; run on every one of them by `collective_rpc`.

    Returns:
        The duration in seconds.
    """
    model = worker.get_model()
    if model not in _of_model:
        config = worker.vllm_config
        partial = config.parallel_config.pipeline_parallel_size > 1
        _of_model[model] = MergedWeights(model, AdapterStore.for_engine(config), partial=partial)
    return _of_model[model].swap(path)


def forget_weights(worker: Any) -> None:
    """Forget what is kept of a vLLM worker's base, which is in place; run by `collective_rpc`."""
    _of_model.pop(worker.get_model(), None)
