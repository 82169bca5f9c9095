"""fp16 for the CPU: weights stored in half precision, arithmetic in float32.

onnxruntime's CPU operators compute in float32 whatever the dtype of the weights, and round to that dtype in between.
With float32 arithmetic only the weights are rounded. onnxruntime widens the weights once, when it loads them.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

__all__ = ["store_weights"]

_FEWEST_VALUES = 256  # smaller weights save no disk space
_DTYPES = {torch.float16: ir.DataType.FLOAT16}


def store_weights(graph: ir.Model, dtype: torch.dtype) -> None:
    """Keep the float32 matrices of a graph in `dtype` (float16), each behind one Cast; vectors stay as they are.

    A matrix is converted when the graph is written, so no converted copy stays in memory.
    """
    inputs = set(graph.graph.inputs)  # initializers that are defaults of inputs
    casts = []
    for value in list(graph.graph.initializers.values()):
        if value not in inputs and _is_weight(value.const_value):
            casts.append(_behind_cast(graph.graph, value, dtype))
    graph.graph.insert_before(graph.graph[0], casts)


def _is_weight(tensor: ir.TensorProtocol | None) -> bool:
    return (
        tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and len(tensor.shape) > 1
        and tensor.size >= _FEWEST_VALUES
    )


def _behind_cast(graph: ir.Graph, value: ir.Value, dtype: torch.dtype) -> ir.Node:
    """Replace an initializer by a copy in another dtype; return the Cast back, which the caller inserts."""
    tensor, name = value.const_value, str(value.name)
    assert tensor is not None

    def convert() -> ir.TensorProtocol:
        return TorchTensor(torch.from_numpy(tensor.numpy()).to(dtype), name=stored_name)

    stored_name = f"{name}.stored"
    stored = ir.LazyTensor(convert, dtype=_DTYPES[dtype], shape=ir.Shape(tensor.shape), name=stored_name)
    source = ir.Value(name=stored_name, shape=stored.shape, type=ir.TensorType(stored.dtype), const_value=stored)
    cast = ir.Node("", "Cast", [source], [ir.AttrInt64("to", ir.DataType.FLOAT)], num_outputs=1, name=f"{name}.widened")
    widened = cast.outputs[0]
    value.replace_all_uses_with(widened)
    del graph.initializers[name]
    widened.name, widened.shape, widened.type = name, stored.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.register_initializer(source)
    return cast
