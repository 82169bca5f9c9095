"""`export` and `verify`: from a model directory to a proven ONNX directory, and the proof alone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from doran_core.errors import ConfigError
from doran_core.merge import merge_checkpoint
from doran_export.cases import GREEDY_STEPS, given_cases, greedy_prompts, random_cases
from doran_export.errors import ExportError
from doran_export.files import MODEL_FILE, copy_companions, read_json
from doran_export.graph import OPSET, check_graph, save_graph, trace
from doran_export.loading import Source, load_model, load_tokenizer, open_source
from doran_export.precision import Precision, precision_for
from doran_export.proof import Proof, prove
from doran_export.reference import Reference, ask_pytorch
from doran_export.report import ExportReport, versions
from doran_export.runtime import available_providers
from doran_export.spec import GraphSpec, make_spec
from doran_export.staging import require_free_place, staged_directory

__all__ = ["Progress", "export", "verify"]

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) as an export goes on."""

# What peft calls the kinds of models, in an adapter's adapter_config.json.
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
    task: str | None = None,
    precision: str = "fp32",
    inputs: Sequence[Any] = (),
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a model to ONNX, prove in ONNX Runtime that it equals PyTorch, and only then leave it in `out`.

    Args:
        model: a Hugging Face model directory, e.g. a merged one. Or give `base` and `adapter`.
        out: the new directory; must not exist, or be empty.
        base: the directory of the model that `adapter` was trained on.
        adapter: an adapter directory, merged into `base` before the export.
        task: kind of model (a name of `TASKS`); None takes it from the architecture or the adapter.
        precision: a name of `PRECISIONS`.
        inputs: inputs to compare on beside random ones: texts, or mappings from input names to arrays.
        tolerance: largest allowed absolute difference of any output; None takes the precision's.
        progress: called with (stage, done, total).

    Returns:
        What was written and every difference that was seen; also in ``export_report.json``.

    Raises:
        CheckpointError: a model directory cannot be read.
        ConfigError: an unknown name, or arguments that do not go together.
        ExportError: `out` is not free, the disk is full, or the graph is not valid.
        MissingDependencyError: onnxruntime is not installed.
        ProofError: the graph does not compute what the model computes; nothing is left in `out`.
        UnsupportedModelError: there is no road for this kind of model.
    """
    if out is None:
        raise ConfigError("no output directory was given")
    out = Path(out)
    wanted = precision_for(precision)
    available_providers()  # a missing onnxruntime is said now, not after minutes of tracing
    require_free_place(out)
    clock = _Clock(progress or (lambda stage, done, total: None))
    if model is not None and base is None and adapter is None:
        source = open_source(Path(model), task)
        with staged_directory(out) as work:
            return _export(source, work, out, wanted, inputs, tolerance, clock)
    if model is not None or base is None or adapter is None:
        raise ConfigError("give either a model directory, or both a base and an adapter directory")
    task = task or _PEFT_TASKS.get(read_json(Path(adapter) / "adapter_config.json").get("task_type") or "")
    # Looked at before the merge, so that a base that cannot be exported is refused before minutes of work. It may
    # lack the head of the task, which then comes with the adapter; the merged directory decides.
    open_source(Path(base), task)
    with staged_directory(out) as work:
        merged = work / "merged"
        with clock.stage("merging"):
            merge_checkpoint(base, adapter, merged, dtype=wanted.dtype, progress=clock.bytes("merging"))
        return _export(open_source(merged, task), work, out, wanted, inputs, tolerance, clock, scratch=merged)


def verify(
    exported: str | Path,
    model: str | Path,
    *,
    task: str | None = None,
    precision: str | None = None,
    inputs: Sequence[Any] = (),
    tolerance: float | None = None,
    providers: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Proof:
    """Prove an exported directory against a model directory, in PyTorch's float32.

    Args:
        exported: a directory that `export` wrote.
        model: the Hugging Face directory that it should equal.
        task: kind of model; None takes it from the exported directory's report, else from the architecture.
        precision: whose tolerance applies; None takes it from the report.
        inputs: inputs to compare on beside random ones: texts, or mappings from input names to arrays.
        tolerance: largest allowed absolute difference of any output; None takes the precision's.
        providers: onnxruntime execution providers to run one by one; None takes all that are available.
        progress: called with (stage, done, total).

    Raises:
        CheckpointError: a directory cannot be read.
        ExportError: the ONNX file breaks a rule of ONNX.
        ProofError: the two differ by more than the tolerance.
    """
    exported = Path(exported)
    report = read_json(exported / "export_report.json")
    wanted = precision_for(precision or report.get("precision") or "fp32")
    source = open_source(Path(model), task or report.get("task"))
    if not (exported / MODEL_FILE).is_file():
        raise ExportError(f"{exported} has no {MODEL_FILE}: expected a directory that `export` wrote")
    clock = _Clock(progress or (lambda stage, done, total: None))
    check_graph(exported / MODEL_FILE)
    with clock.stage("loading"):
        loaded = load_model(source)
        spec = make_spec(loaded, source.task, source.path)
    reference = _ask(loaded, spec, source, inputs, clock)
    del loaded
    return _prove(exported, spec, reference, wanted, tolerance, providers, clock)


def _export(
    source: Source,
    work: Path,
    out: Path,
    precision: Precision,
    inputs: Sequence[Any],
    tolerance: float | None,
    clock: _Clock,
    *,
    scratch: Path | None = None,
) -> ExportReport:
    """Fill the directory `work`, which becomes `out`."""
    with clock.stage("loading"):
        model = load_model(source)
        spec = make_spec(model, source.task, source.path)
    # PyTorch answers first: its weights may change dtype for the trace, and are gone when ONNX Runtime loads its own.
    reference = _ask(model, spec, source, inputs, clock)
    with clock.stage("tracing"):
        graph = trace(model.to(precision.dtype), spec, precision.dtype)
    with clock.stage("writing"):
        path = save_graph(graph, work)
        _write_config(model, source, work)
        copy_companions(source.path, work)
    architecture = type(model).__name__
    del model, graph
    if scratch is not None:
        shutil.rmtree(scratch)
    check_graph(path)
    proof = _prove(work, spec, reference, precision, tolerance, None, clock)
    report = ExportReport(
        out,
        source.task.name,
        architecture,
        precision.name,
        OPSET,
        {file.name: file.stat().st_size for file in sorted(work.glob(f"{MODEL_FILE}*"))},
        proof,
        {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()},
        versions(),
    )
    report.write(work)
    return report


def _ask(model: PreTrainedModel, spec: GraphSpec, source: Source, inputs: Sequence[Any], clock: _Clock) -> Reference:
    tokenizer = load_tokenizer(source.path, pad_left=spec.task.has_cache) if spec.task.reads == "text" else None
    cases = random_cases(spec) + given_cases(spec, inputs, tokenizer)
    prompts = greedy_prompts(spec, inputs, tokenizer) if spec.task.has_cache else None
    steps = min(GREEDY_STEPS, spec.max_length - prompts["input_ids"].shape[1]) if prompts is not None else 0
    with clock.stage("asking PyTorch", len(cases) + (prompts is not None)) as advance:
        return ask_pytorch(model, spec, cases, prompts, steps, advance)


def _prove(
    directory: Path,
    spec: GraphSpec,
    reference: Reference,
    precision: Precision,
    tolerance: float | None,
    providers: Sequence[str] | None,
    clock: _Clock,
) -> Proof:
    names = list(providers) if providers is not None else available_providers()
    total = len(names) * (len(reference.answers) + (reference.greedy is not None))
    tolerance = precision.tolerance if tolerance is None else tolerance
    with clock.stage("proving", total) as advance:
        return prove(directory, spec, reference, tolerance, providers=names, advance=advance)


def _write_config(model: PreTrainedModel, source: Source, out: Path) -> None:
    """Write config.json with the architecture that was exported: a base with a new head names another one."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)


class _Clock:
    """Tells the caller what is going on, and notes how long each stage took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Callable[[], None]]:
        """Time a stage of `total` steps; yields what to call after each. A stage of one step counts itself."""
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self.progress(name, done, total)

        start = time.perf_counter()
        self.progress(name, 0, total)
        yield advance
        self.seconds[name] = time.perf_counter() - start
        if done == 0:
            self.progress(name, total, total)

    def bytes(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(name, done, total)
