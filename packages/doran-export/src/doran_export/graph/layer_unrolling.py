"""Traces three layers instead of thirty: a transformer's layers are alike, so the graph of one is repeated.

torch.export takes seconds per decoder layer, mostly to reason about symbolic lengths, with the same result each time.
So `layer_stack.shortened` leaves three layers for the trace, and `repeat_layers` copies the third one's nodes for each
of the others, with that layer's own weights and cache. Two checks show that the layers are alike: the modules before
the trace, and the third layer's nodes against the second's after it. If a check fails, the whole model is traced. The
export's proof covers both paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from doran_export.graph.layer_stack import KEPT, LayerStack

__all__ = ["NotAlikeError", "repeat_layers"]


class NotAlikeError(Exception):
    """The traced layers are not copies of each other, so the whole model must be traced. Caught inside this package."""


def repeat_layers(model: ir.Model, stack: LayerStack, weights: Mapping[str, Tensor]) -> None:
    """Grow the graph of a shortened model to its full number of layers, in place.

    Args:
        model: the traced graph, not yet optimized, with the tracer's scope names on its nodes.
        stack: the shortened stack.
        weights: the full model's parameters and buffers by the names that the graph gives them.

    Raises:
        NotAlikeError: the graph does not repeat itself from the second traced layer to the third.
    """
    graph = model.graph
    _share_lengths(model)
    step = _Step(stack.path, _nodes_of(graph, stack.path, KEPT - 2), _nodes_of(graph, stack.path, KEPT - 1))
    last = step.template[-1]
    previous: dict[ir.Value, ir.Value] = {value: value for node in step.template for value in node.outputs}
    for index in range(KEPT, len(stack.layers)):
        # `previous` maps the template's values to those of the layer before; `current` to those of this one.
        current: dict[ir.Value, ir.Value] = {}
        copies = []
        for node in step.template:
            inputs = [
                None if value is None else _value_for(graph, step, value, index, previous, current, weights)
                for value in node.inputs
            ]
            copies.append(_copy_node(node, inputs, index, current))
        graph.insert_after(last, copies)
        last = copies[-1]
        _grow_outputs(graph, step, index, current)
        previous = current
    for reader, position, value in step.readers:
        reader.replace_input_with(position, previous[value])
    graph.sort()


def _share_lengths(model: ir.Model) -> None:
    """Make one value of each length: the tracer takes it from any layer's cache, and adds lengths in either order."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    first = inputs.get("past_key_values.0.key")
    if first is None:
        return
    for node in model.graph:
        if node.op_type == "Shape" and str(node.inputs[0].name if node.inputs[0] else "").startswith(
            "past_key_values."
        ):
            span = tuple(node.attributes[key].as_int() for key in ("start", "end") if key in node.attributes)
            if span in ((0, 1), (2, 3)):  # batch and length, which all layers share; not heads and their size
                node.replace_input_with(0, first)
    CommonSubexpressionEliminationPass()(model)
    for node in model.graph:
        left, right = (node.inputs[0], node.inputs[1]) if node.op_type == "Add" else (None, None)
        if left is None or right is None or not (_is_length(left) and _is_length(right)):
            continue
        if str(left.name) > str(right.name):
            node.replace_input_with(0, right)
            node.replace_input_with(1, left)
    CommonSubexpressionEliminationPass()(model)


def _is_length(value: ir.Value) -> bool:
    """Whether a value is one dimension of an input of the graph, as the tracer writes it."""
    squeeze = value.producer()
    shape = (
        squeeze.inputs[0].producer()
        if squeeze is not None and squeeze.op_type == "Squeeze" and squeeze.inputs[0]
        else None
    )
    return shape is not None and shape.op_type == "Shape"


class _Step:
    """The differences from the second traced layer to the third: the pattern to continue."""

    def __init__(self, path: str, before: list[ir.Node], template: list[ir.Node]) -> None:
        self.path = path
        self.template = template
        self.carried = self._match(before, template)  # values of the layer before -> the template's in their place
        self.own = {value for node in template for value in node.outputs}
        self.readers = self._readers(before, template)

    def _match(self, before: list[ir.Node], after: list[ir.Node]) -> dict[ir.Value, ir.Value]:
        if [_kind(node) for node in before] != [_kind(node) for node in after]:
            raise NotAlikeError(f"layers of {self.path} have different nodes")
        pairs = {a: b for x, y in zip(before, after, strict=True) for a, b in zip(x.outputs, y.outputs, strict=True)}
        outputs_before = set(pairs)
        carried: dict[ir.Value, ir.Value] = {}
        for x, y in zip(before, after, strict=True):
            for a, b in zip(x.inputs, y.inputs, strict=True):
                if a is None or b is None:
                    alike = a is b
                elif a in pairs:
                    alike = pairs[a] is b
                elif b in outputs_before:  # handed from one layer to the next
                    carried[b] = pairs[b]
                    alike = True
                else:
                    alike = a is b or _differ_by_number(a, b, self.path)
                if not alike:
                    raise NotAlikeError(f"layers of {self.path} take different inputs at {y.op_type} {y.name}")
        return carried

    def _readers(self, before: list[ir.Node], template: list[ir.Node]) -> list[tuple[ir.Node, int, ir.Value]]:
        """The uses of the template in the rest of the graph, which must use the last layer instead."""
        inside = {*before, *template}
        readers = []
        for node in inside:
            for value in node.outputs:
                for user, position in value.uses():
                    if user in inside:
                        continue
                    if value not in self.carried.values():
                        raise NotAlikeError(f"{user.op_type} {user.name} reads the inside of a layer of {self.path}")
                    readers.append((user, position, value))
        return readers


def _nodes_of(graph: ir.Graph, path: str, index: int) -> list[ir.Node]:
    """Nodes that the tracer put in the scope of a layer, and those without a scope that read the layer's cache.

    The second are lengths of the cache, which the tracer takes at the start of the graph, once for each input.
    """
    scope = re.compile(rf"['.]{re.escape(path)}\.(\d+)['.]")
    own = {value for value in graph.inputs if _number(str(value.name), path) == index}
    nodes = []
    for node in graph:
        found = scope.search(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        if found and int(found[1]) == index:
            nodes.append(node)
        elif not found and any(value in own for value in node.inputs):
            nodes.append(node)
            own.update(node.outputs)
    kinds = {attribute.type for node in nodes for attribute in node.attributes.values()}
    if not nodes or ir.AttributeType.GRAPH in kinds:
        raise NotAlikeError(f"no plain nodes of {path}.{index}")
    return nodes


def _kind(node: ir.Node) -> tuple[object, ...]:
    attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
    return node.domain, node.op_type, len(node.inputs), len(node.outputs), attributes


def _differ_by_number(a: ir.Value, b: ir.Value, path: str) -> bool:
    """Whether two inputs of the graph or weights are each other's counterpart in adjacent layers."""
    if not ((a.is_graph_input() and b.is_graph_input()) or (a.is_initializer() and b.is_initializer())):
        return False
    return _renumbered(str(a.name), path, _number(str(a.name), path) + 1) == str(b.name)


def _number(name: str, path: str) -> int:
    match = re.search(rf"(?:{re.escape(path)}|^past_key_values)\.(\d+)\.", name)
    return int(match[1]) if match else -2


def _renumbered(name: str, path: str, index: int) -> str:
    return re.sub(rf"({re.escape(path)}|^past_key_values|^present)\.\d+\.", rf"\g<1>.{index}.", name, count=1)


def _value_for(
    graph: ir.Graph,
    step: _Step,
    value: ir.Value,
    index: int,
    previous: Mapping[ir.Value, ir.Value],
    current: Mapping[ir.Value, ir.Value],
    weights: Mapping[str, Tensor],
) -> ir.Value:
    """The value in layer `index` that corresponds to `value` in the template."""
    if value in step.own:
        return current[value]
    if value in step.carried:
        return previous[step.carried[value]]
    if _number(str(value.name), step.path) != KEPT - 1:
        return value  # the mask, the rotation and other values that all layers share
    name = _renumbered(str(value.name), step.path, index)
    if value.is_initializer():
        if name not in graph.initializers:
            tensor = TorchTensor(weights[name].detach(), name=name)
            made = ir.Value(name=name, shape=tensor.shape, type=value.type, const_value=tensor)
            graph.register_initializer(made)
        return graph.initializers[name]
    for known in graph.inputs:
        if known.name == name:
            return known
    made = ir.Value(name=name, shape=value.shape, type=value.type)
    graph.inputs.append(made)
    return made


def _copy_node(node: ir.Node, inputs: list[ir.Value | None], index: int, current: dict[ir.Value, ir.Value]) -> ir.Node:
    outputs = []
    for value in node.outputs:
        current[value] = ir.Value(name=f"{value.name}_layer_{index}", shape=value.shape, type=value.type)
        outputs.append(current[value])
    name = f"{node.name}_layer_{index}"
    return ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        overload=node.overload,
        outputs=outputs,
        version=node.version,
        name=name,
    )


def _grow_outputs(graph: ir.Graph, step: _Step, index: int, current: Mapping[ir.Value, ir.Value]) -> None:
    """Add the new layer's cache to the graph's outputs, as in the template."""
    for value in list(graph.outputs):
        if value in step.own:
            made = current[value]
            made.name = _renumbered(str(value.name), step.path, index)
            graph.outputs.append(made)
