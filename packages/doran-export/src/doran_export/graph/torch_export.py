"""Turns a model into one ONNX file through torch.export, with named axes and no path of this machine."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript.optimizer import fold_constants
from transformers import PreTrainedModel

from doran_export.adapters.adapted_model import adapted_layers, give_defaults
from doran_export.errors import ExportError, UnsupportedModelError
from doran_export.files import MODEL_FILE
from doran_export.graph.layer_stack import KEPT, find_layers, shortened
from doran_export.graph.layer_unrolling import NotAlikeError, repeat_layers
from doran_export.graph.spec import Axis, GraphSpec
from doran_export.graph.trace_cache import Traces, named_weights, trace_key
from doran_export.graph.wrappers import eager_attention, example_inputs, wrap

__all__ = ["check_graph", "graph_opset", "save_graph", "trace"]

_OPSET = 20

_RUNTIME_OPERATORS = frozenset({"SimplifiedLayerNormalization"})  # in ONNX's domain by onnxruntime

_TRACES = Traces()

_INLINE_LIMIT = 256 * 1024 * 1024  # a protobuf can have 2 GB; weights go to a separate file well below that


def trace(model: PreTrainedModel, spec: GraphSpec, dtype: torch.dtype) -> ir.Model:
    """Trace a model of this dtype into an ONNX graph that shares the model's memory.

    Raises:
        UnsupportedModelError: torch.export or the ONNX translation cannot express the model.
    """
    with eager_attention(model), adapted_layers(model, spec.adapted), _quiet(), torch.no_grad():
        graph = _trace_repeated(model, spec, dtype) or _trace(model, spec, dtype)
    _tidy(graph)
    _name_axes(graph, spec)
    _strip_metadata(graph)
    give_defaults(graph, spec, dtype)
    return graph


def _trace_repeated(model: PreTrainedModel, spec: GraphSpec, dtype: torch.dtype) -> ir.Model | None:
    """The graph of a model with equal layers, from a trace of a few of them; None for other models."""
    stack = find_layers(model)
    if stack is None:
        return None
    with shortened(model, stack):
        graph = _trace(model, spec.with_layers(KEPT, stack.path), dtype)
    try:
        repeat_layers(graph, stack, named_weights(wrap(model, spec)))
    except NotAlikeError:
        return None
    for values, names in ((graph.graph.inputs, spec.inputs), (graph.graph.outputs, spec.outputs)):
        by_name = {value.name: value for value in values}
        values.clear()
        values.extend(by_name[name] for name in names)
    return graph


def _trace(model: PreTrainedModel, spec: GraphSpec, dtype: torch.dtype) -> ir.Model:
    function = wrap(model, spec)
    key, weights = trace_key(model, spec, dtype), named_weights(function)
    known = _TRACES.recall(key, weights)
    if known is not None:
        return known
    arguments, shapes = example_inputs(spec, dtype)
    try:
        traced = torch.export.export(function, (), kwargs=arguments, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            traced,
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            opset_version=_OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced to ONNX by torch {torch.__version__}: {_root_cause(error)}"
        ) from error
    if program is None:
        raise UnsupportedModelError(f"torch.onnx.export returned nothing for {type(model).__name__}")
    _TRACES.keep(key, program.model, weights)
    return program.model


def _tidy(graph: ir.Model) -> None:
    """Fold constants, and drop unused and duplicate nodes.

    The exporter's own optimizer also rewrites patterns of nodes, at a second per layer; onnxruntime fuses them anyway
    when it loads the graph.
    """
    common_passes.InlinePass()(graph)
    fold_constants(graph, should_fold=_may_fold)
    ir.passes.Sequential(
        common_passes.RemoveUnusedNodesPass(),
        common_passes.RemoveUnusedFunctionsPass(),
        common_passes.RemoveUnusedOpsetsPass(),
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.DeduplicateInitializersPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
    )(graph)


def save_graph(graph: ir.Model, directory: Path) -> bool:
    """Write ``model.onnx``; large weights go to ``model.onnx.data`` beside it. Returns whether they did."""
    path = directory / MODEL_FILE
    weights = sum(
        value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None
    )
    external = f"{MODEL_FILE}.data" if weights > _INLINE_LIMIT else None
    ir.save(graph, path, external_data=external)
    return external is not None


def check_graph(path: Path) -> None:
    """Run onnx.checker on a file, external data included. Nothing is written.

    onnxruntime registers one of its operators in ONNX's domain, and its model builder writes graphs with it. The
    checker then gets a copy of the graph in memory, with that operator in onnxruntime's domain, and with external
    weights as inputs, because it cannot find their file. This function checks that the weights exist.

    Raises:
        ExportError: the file breaks a rule of ONNX.
    """
    model = onnx.load(path, load_external_data=False)
    own = [node for node in model.graph.node if node.domain == "" and node.op_type in _RUNTIME_OPERATORS]
    for node in own:
        node.domain = "com.microsoft"
    if own:
        _take_external_weights(model.graph, path)
    try:
        onnx.checker.check_model(model if own else str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses {path.name}: {str(error).strip().splitlines()[0]}") from error


def _take_external_weights(graph: onnx.GraphProto, path: Path) -> None:
    for tensor in list(graph.initializer):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        file = path.parent / place["location"]
        end = int(place.get("offset", 0)) + int(place.get("length", 0))
        if not file.is_file() or file.stat().st_size < end:
            raise ExportError(f"{path.name}: {file.name}, which holds {tensor.name}, is missing or too short")
        graph.initializer.remove(tensor)
        if tensor.name not in {value.name for value in graph.input}:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def graph_opset(path: Path) -> int:
    """Version of ONNX's own operators in a file."""
    model = onnx.load(path, load_external_data=False)
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))


def _root_cause(error: BaseException) -> str:
    """First line of the error at the bottom: torch wraps it in advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _may_fold(node: ir.Node) -> bool | None:
    """Do not fold a transposed weight if the weight is also used untransposed: a tied table would be stored twice."""
    return False if node.op_type == "Transpose" and len(list(node.inputs[0].uses())) > 1 else None


def _name_axes(graph: ir.Model, spec: GraphSpec) -> None:
    """Give the inputs and outputs the axis names of the spec: torch names some of them s0, s1, ..."""
    for values, wanted in ((graph.graph.inputs, spec.inputs), (graph.graph.outputs, spec.outputs)):
        if [value.name for value in values] != list(wanted):
            raise ExportError(f"the graph has {[value.name for value in values]}, expected {list(wanted)}")
        for value in values:
            axes: tuple[Axis | None, ...] = wanted[str(value.name)]
            traced = value.shape if value.shape is not None else ir.Shape([None] * len(axes))
            value.shape = ir.Shape([traced[index] if axis is None else axis for index, axis in enumerate(axes)])


def _strip_metadata(graph: ir.Model) -> None:
    """Drop the tracer's debug notes: source lines with paths of this machine, which make up half of the file."""
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's messages (operators of missing packages, renamed symbols)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
