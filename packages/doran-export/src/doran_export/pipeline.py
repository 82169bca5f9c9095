"""From an opened model directory to a proven ONNX directory, by either exporter."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from doran_core.adapter import FoldedAdapter
from doran_core.errors import ConfigError
from doran_export.adapters.adapter_file import write_adapter
from doran_export.adapters.separate import adapter_tensors, merged_weights, replaced, union_of_targets
from doran_export.errors import ExportError
from doran_export.files import ADAPTER_SUFFIX, ADAPTERS, MODEL_FILE, copy_side_files
from doran_export.graph.genai import build_graph, require_plain_head
from doran_export.graph.precision import Exporter, Precision
from doran_export.graph.quantize import quantize_weights
from doran_export.graph.spec import GraphSpec, make_spec
from doran_export.graph.storage import store_weights
from doran_export.graph.torch_export import check_graph, graph_opset, save_graph, trace
from doran_export.loading import Source, load_model, load_tokenizer, traceable_experts
from doran_export.proof.cases import GREEDY_STEPS, given_cases, greedy_prompts, random_cases
from doran_export.proof.proof import Proof, prove
from doran_export.proof.reference import Reference, ask_pytorch
from doran_export.report import ExportReport, versions
from doran_export.runtime.providers import PROVIDERS
from doran_export.stage_timer import StageTimer
from doran_export.tasks import TASKS

__all__ = ["Request", "ask", "export_source", "prove_directory"]


@dataclass(frozen=True)
class Request:
    """An export request: the options of the graph and of its proof.

    Attributes:
        exporter: the exporter of the graph.
        precision: of the graph's weights.
        target: the execution provider that the graph is made for.
        providers: execution providers to prove on.
        inputs: the user's inputs, compared beside random ones.
        tolerance: largest allowed difference; None takes the precision's.
        adapters: folded adapters by name, for a graph with adapters as inputs.
        replaced: names of tensors that a merged adapter replaced in full, such as a new classifier's. The model must
            have them; otherwise the user has to name the task.
    """

    exporter: Exporter
    precision: Precision
    target: str
    providers: Sequence[str]
    inputs: Sequence[Any] = ()
    tolerance: float | None = None
    adapters: Mapping[str, FoldedAdapter] = field(default_factory=dict)
    replaced: Sequence[str] = ()

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype that the graph computes in."""
        return self.precision.arithmetic(self.target)

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0.0 < self.tolerance < math.inf:
            raise ConfigError(f"tolerance: expected a positive number or None, got {self.tolerance!r}")


def export_source(
    source: Source, work: Path, out: Path, request: Request, timer: StageTimer, *, scratch: Path | None = None
) -> ExportReport:
    """Fill the directory `work`, which becomes `out`.

    Args:
        source: the model directory.
        work: existing directory.
        out: the final path, for the report.
        request: what to make.
        timer: receives every stage.
        scratch: a directory to remove once it has been read.
    """
    with timer.stage("loading"):
        model = load_model(source)
        _require_replaced(model, source, request.replaced)
        if request.exporter.name == "genai":
            require_plain_head(model)
        else:
            traceable_experts(model, source)
        spec = make_spec(model, source.task, source.path)
        spec = spec.with_adapters(union_of_targets(model, request.adapters))
    # PyTorch answers first: its weights may change dtype for the trace, and are freed before ONNX Runtime loads its
    # own.
    references = _ask_all(model, spec, source, request, timer)
    architecture = type(model).__name__
    if request.exporter.name == "torch":
        _make_with_torch(model, spec, request, work, timer)
        _write_config(model, work)
    del model
    if request.exporter.name == "genai":
        with timer.stage("building"):
            build_graph(source.path, work, request.precision.name, request.target)
        shutil.copyfile(source.path / "config.json", work / "config.json")
    copy_side_files(source.path, work)
    if scratch is not None:
        shutil.rmtree(scratch)
    _write_adapters(request, work)
    check_graph(work / MODEL_FILE)
    proof = prove_directory(work, spec, references, request, timer)
    report = ExportReport(
        out,
        source.task.name,
        architecture,
        request.exporter.name,
        request.precision.name,
        next(name for name, provider in PROVIDERS.items() if provider == request.target),
        graph_opset(work / MODEL_FILE),
        {str(file.relative_to(work)): file.stat().st_size for file in _model_files(work)},
        {name: _describe(adapter) for name, adapter in request.adapters.items()},
        proof,
        {stage: round(seconds, 3) for stage, seconds in timer.seconds.items()},
        versions(),
    )
    report.write(work)
    return report


def _require_replaced(model: PreTrainedModel, source: Source, names: Sequence[str]) -> None:
    """Refuse a task whose model lacks a tensor of the adapter, such as a new head."""
    lost = sorted(set(names) - model.state_dict().keys())
    if lost:
        raise ConfigError(
            f"the adapter brings {lost[0]}, which {type(model).__name__} does not have: {source.task.name} is the "
            f"base's task; name the adapter's task with --task (task=) ({', '.join(TASKS)})"
        )


def _make_with_torch(model: PreTrainedModel, spec: GraphSpec, request: Request, work: Path, timer: StageTimer) -> None:
    _require_range(model, request)
    with timer.stage("tracing"):
        graph = trace(model.to(request.arithmetic), spec, request.arithmetic)
        if request.arithmetic != request.precision.dtype:
            store_weights(graph, request.precision.dtype)
    with timer.stage("writing"):
        external = save_graph(graph, work)
    if request.precision.name == "int8":
        with timer.stage("quantizing"):
            quantize_weights(work, external_data=external)


def _require_range(model: PreTrainedModel, request: Request) -> None:
    """Refuse a weight that a narrower dtype cannot hold. Vectors stay in the dtype of the arithmetic."""
    dtype = request.precision.dtype
    if dtype != torch.float16:
        return  # bfloat16 has float32's range
    largest = torch.finfo(dtype).max
    for name, weight in model.named_parameters():
        stays = weight.dim() < 2 and request.arithmetic != dtype
        if not stays and weight.numel() and max(map(abs, map(float, weight.aminmax()))) > largest:
            raise ExportError(
                f"{name} holds values beyond {largest:.0f}, the largest of {dtype}: expected another precision"
            )


def ask(model: PreTrainedModel, spec: GraphSpec, source: Source, request: Request, timer: StageTimer) -> Reference:
    """PyTorch's answers to random and given inputs, and its greedy tokens where the model is a decoder."""
    padded = request.exporter.name == "torch"
    tokenizer = load_tokenizer(source.path, pad_left=spec.task.has_cache) if spec.task.reads == "text" else None
    cases = random_cases(spec, padded=padded) + given_cases(spec, request.inputs, tokenizer, padded=padded)
    prompts = greedy_prompts(spec, request.inputs, tokenizer) if spec.task.has_cache else None
    steps = min(GREEDY_STEPS, spec.max_length - prompts["input_ids"].shape[1]) if prompts is not None else 0
    with timer.stage("asking PyTorch", len(cases) + (prompts is not None)) as advance:
        return ask_pytorch(model, spec, cases, prompts, steps, advance)


def _ask_all(
    model: PreTrainedModel, spec: GraphSpec, source: Source, request: Request, timer: StageTimer
) -> dict[str | None, Reference]:
    """The answers of the base model and of the model with each adapter merged."""
    references: dict[str | None, Reference] = {None: ask(model, spec, source, request, timer)}
    for name, adapter in request.adapters.items():
        with replaced(model, merged_weights(model, adapter)):
            references[name] = ask(model, spec, source, request, timer)
    return references


def prove_directory(
    directory: Path, spec: GraphSpec, references: Mapping[str | None, Reference], request: Request, timer: StageTimer
) -> Proof:
    """Compare an exported directory with PyTorch's recorded outputs, on every provider."""
    per_provider = sum(len(reference.answers) + (reference.greedy is not None) for reference in references.values())
    tolerance = request.precision.tolerance if request.tolerance is None else request.tolerance
    with timer.stage("proving", len(request.providers) * per_provider) as advance:
        return prove(
            directory, spec, references, request.precision, tolerance, providers=request.providers, advance=advance
        )


def _write_adapters(request: Request, work: Path) -> None:
    if request.adapters:
        (work / ADAPTERS).mkdir()
    for name, adapter in request.adapters.items():
        tensors = adapter_tensors(adapter, request.arithmetic)
        write_adapter(tensors, work / ADAPTERS / f"{name}{ADAPTER_SUFFIX}")


def _describe(adapter: FoldedAdapter) -> dict[str, Any]:
    ranks = sorted({part.rank for part in adapter.modules.values()})
    return {"modules": len(adapter.modules), "ranks": ranks, "base_fingerprint": adapter.base_fingerprint}


def _model_files(work: Path) -> list[Path]:
    return [*sorted(work.glob(f"{MODEL_FILE}*")), *sorted(work.glob(f"{ADAPTERS}/*"))]


def _write_config(model: PreTrainedModel, out: Path) -> None:
    """Write config.json with the exported architecture. A base with a new head names another one."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
