"""vLLM's adapter managers, extended to read doran's forms and to give each layer its scale. Does not import vLLM.

Loading checks all names, shapes and ranks before vLLM registers the adapter: a later error would leave a registered,
half loaded adapter. `prepare_adapters` loads a step's adapters before the step, where an error ends no engine: see
`guard`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from doran_core.errors import AdapterFormatError, DoranError, TargetError, TensorShapeError
from doran_serve.admission import unmarked
from doran_serve.layer_map import nearest, output_sizes, place_name, renamer
from doran_serve.layers import ScaledOutput
from doran_serve.records import ServedAdapter, ServedModule
from doran_serve.store import AdapterStore
from doran_serve.vllm_symbols import lookup

if TYPE_CHECKING:

    class StockModelManager:
        """The parts of vLLM's `LRUCacheLoRAModelManager` that `DoranScales` uses."""

        lora_index_to_id: list[int | None]
        model: torch.nn.Module
        modules: dict[str, Any]
        packed_modules: dict[str, list[str]]

        _registered_adapters: Any
        capacity: int

        def _add_adapter(self, lora: Any) -> None: ...
        def __len__(self) -> int: ...
        def activate_adapter(self, lora_id: int) -> bool: ...
        def add_adapter(self, adapter: Any) -> bool: ...
        def get_adapter(self, adapter_id: int) -> Any: ...
        def list_adapters(self) -> dict[int, Any]: ...
        def remove_adapter(self, adapter_id: int) -> bool: ...
        def remove_oldest_adapter(self) -> bool: ...

    class StockWorkerManager:
        """The parts of vLLM's `LRUCacheWorkerLoRAManager` that `DoranLoading` uses."""

        _adapter_manager: StockModelManager
        lora_config: Any

        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None: ...
        def _apply_adapters(self, lora_requests: set[Any]) -> None: ...
        def _load_adapter(self, lora_request: Any) -> Any: ...
        def add_adapter(self, lora_request: Any) -> bool: ...

else:
    StockModelManager = StockWorkerManager = object

__all__ = [
    "DoranLoading",
    "DoranScales",
    "forget_adapters",
    "prepare_adapters",
    "with_doran_loading",
    "with_doran_scales",
]

_SCALES = "doran_scales"
"""Attribute of vLLM's LoRAModel: vLLM layer name to the full scale `[d_out_i]` of each projection packed in it."""

_SOURCE = "doran_source"
"""Attribute of vLLM's LoRAModel: the path that it was loaded from, or `_STAND_IN`."""
_STAND_IN = "stand-in"


class DoranScales(StockModelManager):
    """Mixin over vLLM's model manager: fills a slot's scales together with its factors."""

    def activate_adapter(self, lora_id: int) -> bool:
        """Fill a slot with the adapter's factors (vLLM) and scales."""
        activated = super().activate_adapter(lora_id)
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            scales: Mapping[str, list[torch.Tensor]] = getattr(self.get_adapter(lora_id), _SCALES, {})
            for name, parts in scales.items():
                layer = self.modules[name]
                assert isinstance(layer, ScaledOutput)  # _places took it from this very dict
                layer.set_scale(slot, parts)
        return activated

    def _add_adapter(self, lora: Any) -> None:
        """Register an adapter, also one without layers on this worker: vLLM's method reads the first layer."""
        if lora.loras:
            super()._add_adapter(lora)
        else:
            self._registered_adapters[lora.id] = lora


class DoranLoading(StockWorkerManager):
    """Mixin over vLLM's worker manager: reads an adapter through an `AdapterStore`."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._store = AdapterStore.for_engine(vllm_config)
        # With pipeline parallelism a worker has only some layers; the frontend has checked the names.
        self._partial = vllm_config.parallel_config.pipeline_parallel_size > 1

    def prepare(self, lora_requests: Sequence[Any]) -> tuple[dict[int, str], dict[int, str]]:
        """Load the adapters of the next step and give them slots.

        A failed adapter gets an empty stand-in, so that the step can run; `guard` discards its results.

        Returns:
            By number: the error of each adapter that failed, and the path of each adapter that is loaded now.
        """
        errors = {}
        for request in lora_requests:
            try:
                self.add_adapter(request)
            except Exception as error:
                errors[request.lora_int_id] = f"{type(error).__name__}: {error}"
                self._stand_in(request.lora_int_id)
        loaded = self._adapter_manager.list_adapters()
        return errors, {number: getattr(model, _SOURCE, "") for number, model in loaded.items()}

    def add_adapter(self, lora_request: Any) -> bool:
        """vLLM's method, but two versions never share a number, and a failed adapter is tried again."""
        number = lora_request.lora_int_id
        loaded = self._adapter_manager.list_adapters().get(number)
        source = getattr(loaded, _SOURCE, None)
        if source == _STAND_IN:
            self._adapter_manager.remove_adapter(number)
        elif source not in (None, lora_request.lora_path) and not lora_request.load_inplace:
            raise AdapterFormatError(
                f"{lora_request.lora_path}: its number {number} stands for {source}; two adapters need two numbers"
            )
        try:
            added = super().add_adapter(lora_request)
        except Exception:
            if loaded is None:  # vLLM may have registered it before its layers refused it
                self._adapter_manager.remove_adapter(number)
            raise
        setattr(self._adapter_manager.list_adapters()[number], _SOURCE, lora_request.lora_path)
        return added

    def _apply_adapters(self, lora_requests: set[Any]) -> None:
        loaded = self._adapter_manager.list_adapters()
        super()._apply_adapters(
            {
                request
                for request in lora_requests
                if request and getattr(loaded.get(request.lora_int_id), _SOURCE, None) != _STAND_IN
            }
        )

    def _stand_in(self, number: int) -> None:
        manager = self._adapter_manager
        manager.remove_adapter(number)
        if len(manager) + 1 > manager.capacity:
            manager.remove_oldest_adapter()
        empty = lookup("LoRAModel")(number, 1, {})
        setattr(empty, _SOURCE, _STAND_IN)
        manager.add_adapter(empty)
        manager.activate_adapter(number)

    def _load_adapter(self, lora_request: Any) -> Any:
        if hasattr(lora_request, "lora_tensors"):  # another package's request, for its own loader below ours
            return self._load_foreign(lora_request)
        path = lookup("get_adapter_absolute_path")(lora_request.lora_path)
        source, digest = unmarked(path)
        if digest is None:
            self._store.require_directory(path, lora_request.lora_name)
        adapter, folder = self._store.load_admitted(path)
        places = _places(self._adapter_manager)
        if adapter is not None and (
            adapter.form != "lora" or set(self._names(adapter, places).values()) <= places.keys()
        ):
            return self._build(adapter, places, lora_request.lora_int_id)
        model = super()._load_adapter(_from_folder(lora_request, folder))  # layers that only vLLM adapts
        if not self._partial:
            _check_adapted(source, model, self._adapter_manager)
        return model

    def _load_foreign(self, lora_request: Any) -> Any:
        config = getattr(lora_request, "peft_config", None) or {}
        if config.get("use_dora") or config.get("peft_type") == "DORAN":
            raise AdapterFormatError(
                f"adapter {lora_request.lora_name!r}: another package (such as verl) hands vLLM an adapter's tensors, "
                "and can load only LoRA that way; for DoRA and DoRAN use doran_serve.reload_adapter, or merged weights"
            )
        return super()._load_adapter(lora_request)

    def _names(self, adapter: ServedAdapter, places: Mapping[str, Any]) -> dict[str, str]:
        """The adapter's module names to vLLM's."""
        rename = renamer(self._adapter_manager.model, lookup("parse_fine_tuned_lora_name"))
        return {name: place_name(module, rename, places) for name, module in adapter.modules.items()}

    def _build(self, adapter: ServedAdapter, places: Mapping[str, tuple[str, int]], adapter_id: int) -> Any:
        """vLLM's record of the adapter: factors by vLLM's module names, and the scales by layer."""
        manager = self._adapter_manager
        names = self._names(adapter, places)
        weights: dict[str, Any] = {}
        scales: dict[str, dict[int, torch.Tensor]] = {}
        for module in adapter.modules.values():
            name = names[module.name]
            if name not in places:
                if self._partial:
                    continue
                raise TargetError(
                    f"{adapter.path}: {module.name}: the served model has no layer of this name that takes a "
                    f"{adapter.form} adapter" + nearest(name, places)
                )
            layer_name, position = places[name]
            layer = manager.modules[layer_name]
            _check_shapes(adapter, module, layer, position, len(manager.packed_modules.get(layer_name, [name])))
            weights[name] = lookup("LoRALayerWeights")(
                name,
                module.A.shape[0],
                module.A.shape[0],
                module.A.to(self.lora_config.lora_dtype),
                module.B.to(self.lora_config.lora_dtype),
                scaling=1.0,
            )
            if module.scale is not None:
                scales.setdefault(layer_name, {})[position] = module.scale
        model = lookup("LoRAModel")(adapter_id, adapter.rank, weights)
        setattr(model, _SCALES, {name: _fill(manager.modules[name], parts) for name, parts in scales.items()})
        return model


def prepare_adapters(worker: Any, lora_requests: Sequence[Any]) -> tuple[dict[int, str], dict[int, str]]:
    """`DoranLoading.prepare` of a vLLM worker; run on every one of them by `collective_rpc`."""
    manager = worker.model_runner.lora_manager
    if not isinstance(manager, DoranLoading) or type(manager)._load_adapter is not DoranLoading._load_adapter:
        raise DoranError(
            f"another package has replaced vLLM's adapter loading after doran-serve ({type(manager).__qualname__}), so "
            "DoRA and DoRAN adapters would lose their scales; use one of the two"
        )
    return manager.prepare(lora_requests)


def forget_adapters(worker: Any) -> None:
    """Empty every slot of a vLLM worker, because the slots' memory may be lost; run by `collective_rpc`."""
    worker.model_runner.lora_manager.remove_all_adapters()


def _from_folder(lora_request: Any, folder: Path) -> Any:
    request = copy.copy(lora_request)
    request.lora_path = str(folder)
    return request


def with_doran_scales(stock: type) -> type:
    """A subclass of vLLM's model manager with `DoranScales`."""
    return type("DoranLoRAModelManager", (DoranScales, stock), {"__module__": __name__})


def with_doran_loading(stock: type, model_manager: type) -> type:
    """A subclass of vLLM's worker manager with `DoranLoading`, over `model_manager`."""
    namespace = {"__module__": __name__, "_manager_cls": model_manager}
    return type("DoranWorkerLoRAManager", (DoranLoading, stock), namespace)


def _places(manager: StockModelManager) -> dict[str, tuple[str, int]]:
    """By projection name: the layer's name, and the projection's position in the layer."""
    places: dict[str, tuple[str, int]] = {}
    for layer_name, layer in manager.modules.items():
        if isinstance(layer, ScaledOutput):
            for position, name in enumerate(manager.packed_modules.get(layer_name, [layer_name])):
                places[name] = (layer_name, position)
    return places


def _check_adapted(path: str, model: Any, manager: StockModelManager) -> None:
    """Refuse an adapter if vLLM would silently ignore a part of it."""
    known = set(manager.modules)
    for names in manager.packed_modules.values():
        known.update(names)
    known |= {name.removeprefix("model.") for name in known}  # embedding models are adapted without their wrapper
    for name in model.loras:
        owner = name.partition(".experts")[0] + ".experts" if ".experts" in name else name
        if name not in known and owner not in known:
            raise TargetError(f"{path}: {name}: vLLM adapts no layer of this name" + nearest(name, known))


def _check_shapes(adapter: ServedAdapter, module: ServedModule, layer: Any, position: int, packed: int) -> None:
    """Refuse factors that do not fit the layer; all sizes unsharded."""
    sizes = output_sizes(layer.base_layer)
    if packed == 1:
        sizes = [sum(sizes)]
    if len(sizes) != packed:
        raise TargetError(
            f"{adapter.path}: {module.name}: vLLM packs {packed} projections into {len(sizes)} slices here, "
            "which doran-serve does not split"
        )
    expected = (sizes[position], layer.base_layer.input_size)
    found = (module.B.shape[0], module.A.shape[1])
    if found != expected:
        raise TensorShapeError(
            f"{adapter.path}: {module.name}: adapts a weight of shape {list(found)}, "
            f"but the served layer's is {list(expected)}"
        )


def _fill(layer: Any, parts: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
    """The scale of every projection of a layer; 1 for projections that the adapter does not change."""
    sizes = output_sizes(layer.base_layer)
    if len(parts) == 1 and parts.get(0) is not None and parts[0].shape[0] == sum(sizes):
        return [parts[0]]
    return [parts.get(i, torch.ones(size)) for i, size in enumerate(sizes)]
