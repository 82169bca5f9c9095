"""vLLM's adapter managers, taught to read doran's forms and to hand each layer its scale. Does not import vLLM.

Loading checks everything, names, shapes, ranks, before vLLM registers the adapter: an error after that would leave it
registered and half loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from doran_core.errors import TargetError, TensorShapeError
from doran_serve.layer_map import nearest, output_sizes, renamer
from doran_serve.layers import ScaledOutput
from doran_serve.records import ServedAdapter, ServedModule
from doran_serve.store import AdapterStore
from doran_serve.vllm_symbols import lookup

if TYPE_CHECKING:

    class StockModelManager:
        """What `DoranScales` relies on in vLLM's `LRUCacheLoRAModelManager`."""

        lora_index_to_id: list[int | None]
        model: torch.nn.Module
        modules: dict[str, Any]
        packed_modules: dict[str, list[str]]

        def activate_adapter(self, lora_id: int) -> bool: ...
        def get_adapter(self, adapter_id: int) -> Any: ...

    class StockWorkerManager:
        """What `DoranLoading` relies on in vLLM's `LRUCacheWorkerLoRAManager`."""

        _adapter_manager: StockModelManager
        lora_config: Any

        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None: ...
        def _load_adapter(self, lora_request: Any) -> Any: ...

else:
    StockModelManager = StockWorkerManager = object

__all__ = ["DoranLoading", "DoranScales", "with_doran_loading", "with_doran_scales"]

_SCALES = "doran_scales"
"""Attribute of vLLM's LoRAModel: vLLM layer name to the full scale `[d_out_i]` of each projection packed in it."""


class DoranScales(StockModelManager):
    """Mixin over vLLM's model manager: an adapter that gets a slot brings its scales along."""

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


class DoranLoading(StockWorkerManager):
    """Mixin over vLLM's worker manager: reads an adapter through an `AdapterStore`."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._store = AdapterStore.for_engine(vllm_config)
        # With pipeline parallelism a worker has some of the layers; the front process has checked the names.
        self._partial = vllm_config.parallel_config.pipeline_parallel_size > 1

    def _load_adapter(self, lora_request: Any) -> Any:
        path = lookup("get_adapter_absolute_path")(lora_request.lora_path)
        self._store.require_directory(path, lora_request.lora_name)
        adapter = self._store.load(path)
        if adapter is None:  # a LoRA of a kind that only vLLM knows
            return super()._load_adapter(lora_request)
        return self._build(adapter, lora_request.lora_int_id)

    def _build(self, adapter: ServedAdapter, adapter_id: int) -> Any:
        """vLLM's record of the adapter: factors by vLLM's module names, and the scales by layer."""
        manager = self._adapter_manager
        places = _places(manager)
        rename = renamer(manager.model, lookup("parse_fine_tuned_lora_name"))
        weights: dict[str, Any] = {}
        scales: dict[str, dict[int, torch.Tensor]] = {}
        for module in adapter.modules.values():
            name = rename(module.name)
            if name not in places and f"model.{name}" in places:  # embedding models are adapted without their wrapper
                name = f"model.{name}"
            if name not in places:
                if self._partial:
                    continue
                raise TargetError(
                    f"{adapter.path}: {module.name}: the served model has no adaptable layer of this name"
                    + nearest(name, places)
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


def with_doran_scales(stock: type) -> type:
    """A subclass of vLLM's model manager with `DoranScales`."""
    return type("DoranLoRAModelManager", (DoranScales, stock), {"__module__": __name__})


def with_doran_loading(stock: type, model_manager: type) -> type:
    """A subclass of vLLM's worker manager with `DoranLoading`, over `model_manager`."""
    namespace = {"__module__": __name__, "_manager_cls": model_manager}
    return type("DoranWorkerLoRAManager", (DoranLoading, stock), namespace)


def _places(manager: StockModelManager) -> dict[str, tuple[str, int]]:
    """Each adaptable projection's name to its layer's name and its position in that layer."""
    places: dict[str, tuple[str, int]] = {}
    for layer_name, layer in manager.modules.items():
        if isinstance(layer, ScaledOutput):
            for position, name in enumerate(manager.packed_modules.get(layer_name, [layer_name])):
                places[name] = (layer_name, position)
    return places


def _check_shapes(adapter: ServedAdapter, module: ServedModule, layer: Any, position: int, packed: int) -> None:
    """Refuse factors that do not fit the layer; all sizes unsharded."""
    sizes = output_sizes(layer.base_layer)
    if packed == 1:
        sizes = [sum(sizes)]
    if len(sizes) != packed:
        raise TargetError(
            f"{adapter.path}: {module.name}: vLLM packs {packed} projections into {len(sizes)} slices there, "
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
    """The scale of every projection of a layer, 1 for those that the adapter leaves alone."""
    sizes = output_sizes(layer.base_layer)
    if len(parts) == 1 and parts.get(0) is not None and parts[0].shape[0] == sum(sizes):
        return [parts[0]]
    return [parts.get(i, torch.ones(size)) for i, size in enumerate(sizes)]
