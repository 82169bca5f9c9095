"""Swaps the base's expert weights for adapted ones, through the served model's own loader.

vLLM keeps the experts of a layer in two parameters, and each backend packs them its own way. So this file merges the
checkpoint's tensors, loads them with the model's loader into a stand-in, packs the stand-in as vLLM packed the base,
and copies it into the parameter. Before a stack changes for the first time, its base tensors take the same steps, and
must equal the parameter bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from doran_core.checkpoint.binding import BoundModule
from doran_core.errors import TargetError
from doran_core.merge.tensors import base_tensors, merged_tensors
from doran_serve.vllm_symbols import lookup_optional

__all__ = ["ExpertWeights"]

_PARAMETERS = ("w13_weight", "w2_weight")
"""vLLM's names of the gate and up projections of all experts, and of their down projections."""

_Place = tuple[str, str]
"""Name of an experts layer in vLLM's model, and of its parameter."""


class ExpertWeights:
    """The expert weights of one worker's model.

    Args:
        model: vLLM's.
        keep: copies base weights to a device that has room.
        partial: the model has only some of the layers (pipeline parallelism).
    """

    def __init__(self, model: nn.Module, keep: Callable[[Tensor], Tensor], *, partial: bool) -> None:
        self._model, self._keep, self._partial = model, keep, partial
        self._layers: dict[str, Any] = {
            name: layer
            for name, layer in model.named_modules()
            if all(isinstance(getattr(layer, part, None), nn.Parameter) for part in _PARAMETERS)
        }
        self._places: dict[str, _Place | None] = {}
        self._base: dict[_Place, Tensor] = {}
        self._changed: set[_Place] = set()

    def check(self, stacks: Mapping[str, Sequence[BoundModule]]) -> None:
        """Find the parameter of each stack, and check that loading the checkpoint's tensors reproduces it.

        Raises:
            TargetError: there is no such parameter, or it differs.
        """
        for stack, modules in stacks.items():
            if stack not in self._places:
                self._places[stack] = self._find(stack, modules)

    def swap(self, stacks: Mapping[str, Sequence[BoundModule]]) -> None:
        """Put the adapter's stacks in place, and the base's weights everywhere else. Call `check` before.

        Raises:
            NonFiniteError: a merged value is not finite; some stacks may have changed then, until the next swap.
        """
        wanted = {place: stack for stack in stacks if (place := self._places[stack]) is not None}
        for place in self._changed - wanted.keys():
            self._parameter(place).data.copy_(self._base[place])
        self._changed &= wanted.keys()
        for place, stack in wanted.items():
            parameter = self._parameter(place)
            if place not in self._base:
                self._base[place] = self._keep(parameter.data)
            self._changed.add(place)  # until the swap is done, the parameter may differ from the base
            parameter.data.copy_(self._loaded(stack, merged_tensors(stacks[stack]))[place])

    def _parameter(self, place: _Place) -> nn.Parameter:
        layer, name = place
        parameter: nn.Parameter = getattr(self._layers[layer], name)
        return parameter

    def _find(self, stack: str, modules: Sequence[BoundModule]) -> _Place | None:
        if any(_moves_experts(layer) for layer in self._layers.values()):
            raise TargetError(f"{stack}: merged mode does not serve experts that vLLM moves (--enable-eplb)")
        loaded = self._loaded(stack, base_tensors(modules))
        if not loaded and self._partial:
            return None
        if len(loaded) != 1:
            found = ", ".join(".".join(place) for place in loaded) or "no parameter of experts"
            raise TargetError(
                f"{stack}: {type(self._model).__name__} loads these weights into {found}, expected one parameter of "
                "experts; serve the checkpoint that `doran merge` makes"
            )
        ((place, values),) = loaded.items()
        live = self._parameter(place).data
        if live.shape != values.shape or not torch.equal(live, values.to(live.device)):
            raise TargetError(
                f"{stack}: vLLM keeps these weights in a layout that doran-serve does not know "
                f"({_backend(self._layers[place[0]])}), or they are not the base's; start with --moe-backend triton, "
                "or serve the checkpoint that `doran merge` makes"
            )
        return place

    def _loaded(self, stack: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[_Place, Tensor]:
        """Load a stack's tensors with the model's loader; return the packed values of each parameter that they fill."""
        near = {name for name in self._layers if _numbers(name) == _numbers(stack)}
        with _stand_ins(self._layers, near) as stand_ins:
            self._model.load_weights(tensors)  # type: ignore[operator]
        filled = {place: stand_in.data for place, stand_in in stand_ins.items() if not stand_in.data.isnan().all()}
        return {place: _packed(self._layers[place[0]], place[1], values) for place, values in filled.items()}


@contextmanager
def _stand_ins(layers: Mapping[str, Any], near: set[str]) -> Iterator[dict[_Place, nn.Parameter]]:
    """Inside this context, every experts parameter is a stand-in of the shape that vLLM's loader fills.

    Args:
        layers: the experts layers by name.
        near: names of the layers that may be loaded. Their stand-ins hold NaN; those of all others
            take no memory.

    Yields:
        The stand-ins of the layers in `near`.
    """
    live = {(name, part): getattr(layer, part) for name, layer in layers.items() for part in _PARAMETERS}
    stand_ins: dict[_Place, nn.Parameter] = {}
    try:
        for (name, part), parameter in live.items():
            shape = _loaded_shape(layers[name], part, parameter)
            device = parameter.device if name in near else "meta"
            values = torch.full(shape, torch.nan, dtype=parameter.dtype, device=device)
            stand_in = stand_ins[name, part] = nn.Parameter(values, requires_grad=False)
            vars(stand_in).update(vars(parameter))  # includes vLLM's loader of this parameter
            setattr(layers[name], part, stand_in)
        yield {place: stand_in for place, stand_in in stand_ins.items() if place[0] in near}
    finally:
        for (name, part), parameter in live.items():
            setattr(layers[name], part, parameter)


def _numbers(name: str) -> list[str]:
    """The numbers in a name: vLLM's and transformers' names of one layer have the same."""
    return [part for part in name.split(".") if part.isdigit()]


def _packing(layer: Any, live: Tensor) -> str | None:
    """How vLLM has packed a layer's experts for the CPU; None if it stores them as loaded."""
    kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
    way: str | None = getattr(getattr(kernel, "fused_experts", None), "isa", None)
    return way if live.device.type == "cpu" else None


def _loaded_shape(layer: Any, part: str, live: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape before vLLM padded it."""
    if _packing(layer, live) is None:
        return tuple(live.shape)
    inner = layer.moe_config.intermediate_size_per_partition
    experts, rows, columns = live.shape
    return (experts, 2 * inner, columns) if part == "w13_weight" else (experts, rows, inner)


def _packed(layer: Any, part: str, values: Tensor) -> Tensor:
    live = getattr(layer, part)
    way, pack = _packing(layer, live), lookup_optional("pack_experts")
    if way is None or pack is None:
        return values
    if live.shape != values.shape:  # padded: gate and up each, or the columns of down
        padded = values.new_zeros(live.shape)
        if part == "w13_weight":
            half, inner = live.shape[1] // 2, values.shape[1] // 2
            padded[:, :inner], padded[:, half : half + inner] = values[:, :inner], values[:, inner:]
        else:
            padded[..., : values.shape[2]] = values
        values = padded
    packed: Tensor = pack(values, way)
    return packed


def _moves_experts(layer: Any) -> bool:
    return bool(getattr(layer.moe_config.moe_parallel_config, "enable_eplb", False))


def _backend(layer: Any) -> str:
    method = layer.quant_method
    backend = getattr(method, "unquantized_backend", None)
    return type(method).__name__ if backend is None else f"backend {backend.value}"
