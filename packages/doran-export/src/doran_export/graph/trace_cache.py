"""A cache of traces in this process: graphs without weights, for models that differ only in their weights.

A trace takes about half of an export's time, and its result depends on the model's configuration only. So a second
precision of a model, or a second adapter of its base, reuses the nodes with its own weights. Each export's proof
checks the result.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from transformers import PreTrainedModel

from doran_export.graph.layer_stack import structural_signature
from doran_export.graph.spec import GraphSpec

__all__ = ["Traces", "named_weights", "trace_key"]

_MOST = 32
_LARGEST_CONSTANT = 4096  # values in a tensor that is kept with a graph
_UNTRACED = ("_name_or_path", "architectures", "transformers_version")  # fields that no trace depends on


def named_weights(function: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a wrapped model by the names that a graph gives them, tied ones under each name."""
    return dict(function.named_parameters(remove_duplicate=False)) | dict(
        function.named_buffers(remove_duplicate=False)
    )


def trace_key(model: PreTrainedModel, spec: GraphSpec, dtype: torch.dtype) -> str:
    """Everything that decides a trace: modules with settings and shapes, configuration, inputs and outputs, dtype."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _UNTRACED}
    settings = json.dumps(config, sort_keys=True, default=repr)
    return hashlib.sha256(repr((structural_signature(model), settings, spec, dtype)).encode()).hexdigest()


class Traces:
    """The last few traces by `trace_key`."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[str, ir.Model] = OrderedDict()

    def keep(self, key: str, graph: ir.Model, weights: Mapping[str, Tensor]) -> None:
        """Keep a copy of a graph without the weights, unless it has other large tensors."""
        initializers = graph.graph.initializers
        others = [value for name, value in initializers.items() if name not in weights]
        if any(value.const_value is None or value.const_value.size > _LARGEST_CONSTANT for value in others):
            return
        copy = graph.clone()
        for name, value in copy.graph.initializers.items():
            if name in weights:
                value.const_value = None
        self._graphs[key] = copy
        while len(self._graphs) > _MOST:
            self._graphs.popitem(last=False)

    def recall(self, key: str, weights: Mapping[str, Tensor]) -> ir.Model | None:
        """A copy of a remembered graph with these weights in it, or None."""
        if key not in self._graphs:
            return None
        self._graphs.move_to_end(key)
        graph = self._graphs[key].clone()
        for name, value in graph.graph.initializers.items():
            if name in weights:
                value.const_value = TorchTensor(weights[name].detach(), name=name)
        return graph
