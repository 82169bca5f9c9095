"""The model with adapters as inputs: every adapted layer takes A, B' and c from outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from doran_core.functional import adapted_output
from doran_export.adapters.separate import PARTS
from doran_export.graph.spec import GraphSpec

__all__ = ["adapted_layers", "give_defaults", "take_adapters"]


class _Slot:
    """The A, B' and c of one layer in one call. Neither module nor plain data, so that tracing sees no state."""

    def __init__(self) -> None:
        self.parts: tuple[Tensor, ...] = ()


class AdaptedLayer(nn.Module):
    """``y = c * (W0 x) + B' A x + bias``, with A, B' and c from its slot."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slot = _Slot()

    def forward(self, x: Tensor) -> Tensor:
        A, B, scale = self.slot.parts
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return adapted_output(self.base_layer(x), x @ A @ B, scale, bias)


class AdaptedFunction(nn.Module):
    """A wrapped model (see `wrappers`) that takes adapters: (inputs by name, parts of all layers) -> outputs."""

    def __init__(self, function: nn.Module, slots: list[_Slot]) -> None:
        super().__init__()
        self.function = function
        self._slots = slots

    def forward(self, inputs: dict[str, Any], adapters: list[Tensor]) -> tuple[Tensor, ...]:
        for number, slot in enumerate(self._slots):
            slot.parts = tuple(adapters[len(PARTS) * number : len(PARTS) * (number + 1)])
        outputs: tuple[Tensor, ...] = self.function(**inputs)
        return outputs


@contextmanager
def adapted_layers(model: PreTrainedModel, names: Iterable[str]) -> Iterator[None]:
    """A context in which each named layer is replaced by an AdaptedLayer."""
    before = {name: model.get_submodule(name) for name in names}
    for name, layer in before.items():
        model.set_submodule(name, AdaptedLayer(layer))
    try:
        yield
    finally:
        for name, layer in before.items():
            model.set_submodule(name, layer)


def take_adapters(function: nn.Module, model: PreTrainedModel, spec: GraphSpec) -> nn.Module:
    """The function of a model whose layers `spec.adapted` are wrapped in `adapted_layers`."""
    layers = [model.get_submodule(name) for name in spec.adapted]
    return AdaptedFunction(function, [layer.slot for layer in layers if isinstance(layer, AdaptedLayer)])


def give_defaults(graph: ir.Model, spec: GraphSpec, dtype: torch.dtype) -> None:
    """Give every adapter input a default, c = 1 and B' = 0 at rank 1. With default inputs the graph computes the base.

    An ONNX initializer with an input's name is the input's default. The default applies in runs without an adapter,
    and for layers that an adapter leaves out.
    """
    inputs = {value.name: value for value in graph.graph.inputs}
    for name, (d_in, d_out) in spec.adapted.items():
        values = (torch.zeros(d_in, 1, dtype=dtype), torch.zeros(1, d_out, dtype=dtype), torch.ones(d_out))
        for part, tensor in zip(PARTS, values, strict=True):
            value = inputs[f"{name}.{part}"]
            value.const_value = ir.tensor(tensor, name=value.name)
            graph.graph.register_initializer(value)
    # Ranks are independent, but the tracer gave them one symbol, and onnxruntime reuses memory by symbol.
    ends = {id(value) for value in (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values())}
    for node in graph.graph.all_nodes():
        for value in node.outputs:
            if id(value) not in ends:
                value.shape = None
