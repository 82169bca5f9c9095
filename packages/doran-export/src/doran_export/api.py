"""`export` and `verify`: from a model directory to a proven ONNX directory, and the proof alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from doran_core.adapter import FoldedAdapter, read_adapter
from doran_core.errors import ConfigError
from doran_core.files.atomic import new_directory
from doran_core.merge import merge_checkpoint
from doran_export.adapters.adapter_file import read_adapter as read_adapter_file
from doran_export.adapters.separate import fold_adapters, merged_weights, replaced, switched_weights
from doran_export.errors import ExportError
from doran_export.files import GENAI_CONFIG, MODEL_FILE, REPORT_FILE, adapter_files, read_json, require_free_place
from doran_export.graph.genai import require_genai
from doran_export.graph.precision import EXPORTERS, exporter_for, precision_for, proof_providers, target_for
from doran_export.graph.spec import GraphSpec, make_spec
from doran_export.graph.torch_export import check_graph
from doran_export.loading import Source, load_model, open_source
from doran_export.pipeline import Request, ask, export_source, prove_directory
from doran_export.proof.proof import Proof
from doran_export.proof.reference import Reference
from doran_export.report import ExportReport
from doran_export.runtime.providers import available_providers, provider_names
from doran_export.stage_timer import Progress, StageTimer

__all__ = ["Progress", "export", "verify"]

# peft's names for tasks, in adapter_config.json.
_PEFT_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def export(
    model: str | Path | None = None,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    task: str | None = None,
    exporter: str | None = None,
    precision: str = "fp32",
    target: str | None = None,
    providers: Sequence[str] | None = None,
    inputs: Sequence[Any] = (),
    tolerance: float | None = None,
    progress: Progress | None = None,
    road: str | None = None,
) -> ExportReport:
    """Export a model to ONNX, prove in ONNX Runtime that it equals PyTorch, and only then leave it in `out`.

    Args:
        model: a Hugging Face model directory, e.g. a merged one. Or give `base` with `adapter` or `adapters`.
        out: the new directory; must not exist, or be empty.
        base: the directory of the model that the adapters were trained on.
        adapter: an adapter directory, merged into `base` before the export.
        adapters: adapter directories by name, which are not merged: the base's graph takes them as inputs, and each
            becomes a file ``adapters/NAME.onnx_adapter`` for `OnnxRunner.set_adapter`.
        task: kind of model (a name of `TASKS`); None takes it from the architecture or the adapter.
        exporter: a name of `EXPORTERS`; None takes genai for a decoder and torch for all other models.
        precision: a name of `PRECISIONS`.
        target: "cpu" or "cuda", where the graph will run; None takes the best provider of the proof. fp16 for the CPU
            has float16 weights and float32 arithmetic; for CUDA the arithmetic is float16, too. Graphs of the genai
            exporter run on their target only.
        providers: execution providers for the proof, "cpu" or "cuda"; None takes all available ones that run the
            precision.
        inputs: inputs to compare on beside random ones: texts, or mappings from input names to arrays.
        tolerance: largest allowed difference of an output, by the precision's rule; None takes the precision's value.
        progress: called with (stage, done, total).
        road: the old name of `exporter`.

    Returns:
        The report: the written files and every difference; also in ``export_report.json``.

    Raises:
        CheckpointError: a model directory cannot be read.
        ConfigError: an unknown name, or arguments that do not go together.
        ExportError: `out` is not free, the disk is full, or the graph is not valid.
        MissingDependencyError: onnxruntime, or for the genai exporter onnxruntime-genai, is not installed.
        ProofError: the graph differs from the model; `out` is not created.
        UnsupportedModelError: there is no exporter for this kind of model, or the target does not run the precision.
    """
    if out is None:
        raise ConfigError("no output directory was given")
    if road is not None:
        warnings.warn("export(road=...) is called exporter=... now", DeprecationWarning, stacklevel=2)
        exporter = exporter or road
    out = Path(out)
    _check_sources(model, base, adapter, adapters)
    task = task or _task_of_adapter(adapter, adapters)
    wanted = precision_for(precision)
    # Fail now, not after minutes of merging and tracing. A base may lack the task's head if the adapter brings it; then
    # the merged directory decides.
    available = available_providers()
    require_free_place(out)
    place = Path(model if model is not None else base or "")
    source = open_source(place, task)
    chosen = exporter_for(source.task, wanted, exporter, multi_adapter=adapters is not None)
    names = proof_providers(chosen, wanted, provider_names(providers), available)
    made_for = target_for(chosen, wanted, target, names)
    if chosen.name == "genai":
        require_genai()
        names = [made_for]  # its graph has operators of one provider
    timer = StageTimer(progress)
    request = Request(chosen, wanted, made_for, names, inputs, tolerance)
    with new_directory(out, error=ExportError) as work:
        merged = work / "merged"
        if adapters is not None:
            request = replace(request, adapters=fold_adapters(adapters, source.path))
        if adapter is not None:
            if task is None:
                request = replace(request, replaced=sorted(read_adapter(adapter).extra))
            with timer.stage("merging"):
                # In float32, so that PyTorch's answers come from unrounded weights.
                merge_checkpoint(source.path, adapter, merged, dtype=torch.float32, progress=timer.bytes("merging"))
            source = open_source(merged, task)
        return export_source(source, work, out, request, timer, scratch=merged if adapter is not None else None)


def _check_sources(model: object, base: object, adapter: object, adapters: object) -> None:
    if model is not None and base is None and adapter is None and adapters is None:
        return
    if model is None and base is not None and (adapter is None) != (adapters is None):
        return
    raise ConfigError(
        "give either a model directory, or both a base and an adapter directory, or a base and adapters by name"
    )


def _task_of_adapter(adapter: str | Path | None, adapters: Mapping[str, str | Path] | None) -> str | None:
    """The task in the adapters' files, if any."""
    places = [adapter] if adapter is not None else list((adapters or {}).values())
    kinds = [read_json(Path(place) / "adapter_config.json").get("task_type") for place in places]
    return next((_PEFT_TASKS[kind] for kind in kinds if kind in _PEFT_TASKS), None)


def verify(
    exported: str | Path,
    model: str | Path,
    *,
    task: str | None = None,
    precision: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    inputs: Sequence[Any] = (),
    tolerance: float | None = None,
    providers: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Proof:
    """Repeat the proof of an exported directory and all of its adapters against a model directory, in PyTorch's
    float32.

    Args:
        exported: a directory that `export` wrote.
        model: the Hugging Face directory that it should equal.
        task: kind of model; None takes it from the exported directory's report, else from the architecture.
        precision: decides the tolerance; None takes it from the report.
        adapters: adapter directories that the adapters in `exported` should equal, by name. An unnamed adapter is
            merged in PyTorch from its own file, which proves the graph but not the file's origin.
        inputs: inputs to compare on beside random ones: texts, or mappings from input names to arrays.
        tolerance: as in `export`; None takes the precision's.
        providers: execution providers to run one by one, "cpu" or "cuda"; None takes all that run the precision, or
            for the genai exporter the one that the graph was made for.
        progress: called with (stage, done, total).

    Raises:
        CheckpointError: a directory cannot be read.
        ConfigError: `adapters` names one that is not in `exported`.
        ExportError: not an exported directory, an invalid ONNX file, or an adapter of another model.
        ProofError: the two differ by more than the tolerance.
    """
    exported = Path(exported)
    if not (exported / MODEL_FILE).is_file():
        raise ExportError(f"{exported} has no {MODEL_FILE}: expected a directory that `export` wrote")
    report = read_json(exported / REPORT_FILE)
    wanted = precision_for(precision or report.get("precision") or "fp32")
    source = open_source(Path(model), task or report.get("task"))
    chosen = EXPORTERS["genai" if (exported / GENAI_CONFIG).is_file() else "torch"]
    if providers is None and chosen.name == "genai":
        providers = [check["provider"] for check in report.get("proof", {}).get("checks", [])[:1]] or None
    names = proof_providers(chosen, wanted, provider_names(providers), available_providers())
    timer = StageTimer(progress)
    request = Request(chosen, wanted, names[0], names, inputs, tolerance)
    check_graph(exported / MODEL_FILE)
    files = adapter_files(exported)
    if unknown := sorted(set(adapters or {}) - set(files)):
        raise ConfigError(f"{exported} has no adapter {unknown[0]!r}: expected some of {', '.join(files) or 'none'}")
    folded = fold_adapters(adapters, source.path) if adapters else {}
    references, spec = _ask_directory(source, request, files, folded, timer)
    return prove_directory(exported, spec, references, request, timer)


def _ask_directory(
    source: Source,
    request: Request,
    files: Mapping[str, Path],
    folded: Mapping[str, FoldedAdapter],
    timer: StageTimer,
) -> tuple[dict[str | None, Reference], GraphSpec]:
    """PyTorch's answers for the base and for each adapter. The model is freed afterwards."""
    with timer.stage("loading"):
        model = load_model(source)
        spec = make_spec(model, source.task, source.path)
    references: dict[str | None, Reference] = {None: ask(model, spec, source, request, timer)}
    for name, path in files.items():
        if name in folded:
            weights = merged_weights(model, folded[name])
        else:
            weights = switched_weights(model, read_adapter_file(path))
        with replaced(model, weights):
            references[name] = ask(model, spec, source, request, timer)
    return references, spec
