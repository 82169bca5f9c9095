"""`doran export`: a model directory, or a base and an adapter, to a proven ONNX directory.

Imports nothing heavy before the command runs: every `doran` command loads this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from doran_core.cli.command import Command, Outcome
from doran_core.errors import ConfigError

if TYPE_CHECKING:
    from doran_export.report import ExportReport

__all__ = ["COMMAND"]

_TASKS = (
    "text-generation",
    "text-classification",
    "token-classification",
    "fill-mask",
    "image-classification",
    "feature-extraction",
)


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="merged Hugging Face model directory")
    source.add_argument("--base", metavar="DIR", help="base model directory; goes with --adapter")
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="DIR",
        help="adapter directory, merged into --base first; with --multi-adapter NAME=DIR, once or more",
    )
    parser.add_argument(
        "--multi-adapter",
        action="store_true",
        help="write the base's graph once, with adapters as inputs, and each adapter as a small .onnx_adapter file",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write; must not exist or be empty")
    parser.add_argument("--task", metavar="NAME", help=f"kind of model, when it cannot be told: {', '.join(_TASKS)}")
    parser.add_argument(
        "--road",
        metavar="NAME",
        help="how the graph is made: genai (onnxruntime-genai's builder; the default for decoders) or torch",
    )
    parser.add_argument(
        "--precision", default="fp32", metavar="NAME", help="fp32 (default), fp16, bf16, int8, or with genai int4"
    )
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="make the graph for cpu or cuda (default: the best that is here); decides what fp16 computes in",
    )
    parser.add_argument(
        "--provider", action="append", metavar="NAME", help="prove on cpu or cuda only (may be given twice)"
    )
    parser.add_argument(
        "--inputs", metavar="FILE", help="inputs to compare on beside random ones: .txt, a text per line, or .npz"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="allowed difference from PyTorch; default: by precision, see README",
    )


def _run(arguments: argparse.Namespace) -> Outcome:
    from doran_export.api import export
    from doran_export.proof.cases import read_inputs

    adapter, adapters = _adapters(arguments)
    with _Stages() as progress:
        report = export(
            arguments.model,
            arguments.out,
            base=arguments.base,
            adapter=adapter,
            adapters=adapters,
            task=arguments.task,
            road=arguments.road,
            providers=arguments.provider,
            precision=arguments.precision,
            target=arguments.target,
            inputs=read_inputs(Path(arguments.inputs)) if arguments.inputs else (),
            tolerance=arguments.tolerance,
            progress=progress,
        )
    return Outcome({"directory": str(report.directory), **report.to_dict()}, _shown(report))


def _shown(report: ExportReport) -> list[str]:
    proof = report.proof
    size = sum(report.files.values()) / 1e6
    what = f"{report.architecture}, {report.task}, {report.precision} for {report.target}, by {report.road}"
    shown = [f"wrote {report.directory}: {what}, {size:.1f} MB"]
    if report.adapters:
        shown.append(f"adapters: {', '.join(report.adapters)}")
    shown.append(f"largest difference from PyTorch {proof.max_difference:.2g} in {len(proof.checks)} checks")
    for greedy in proof.greedy:
        who = f"{greedy.provider}, {greedy.adapter}" if greedy.adapter else greedy.provider
        shown.append(
            f"greedy tokens identical on {greedy.identical} of {greedy.prompts} prompts, "
            f"{greedy.steps} steps each ({who})"
            + (f", {len(greedy.ended)} more until they end" if greedy.ended else "")
        )
    return shown


def _adapters(arguments: argparse.Namespace) -> tuple[str | None, dict[str, str] | None]:
    """The one adapter to merge, or those that stay apart, by name."""
    given: list[str] = arguments.adapter or []
    if not arguments.multi_adapter:
        if len(given) > 1:
            raise ConfigError(f"{len(given)} adapters were given: expected one, or --multi-adapter with NAME=DIR")
        return (given[0] if given else None), None
    named = dict(item.partition("=")[::2] for item in given)
    if not all(named.values()) or len(named) != len(given):
        raise ConfigError(f"--multi-adapter takes --adapter NAME=DIR with different names, got {', '.join(given)}")
    return None, named


class _Stages:
    """One progress bar per stage."""

    def __init__(self) -> None:
        from doran_core.support.progress import ProgressBar

        self._bar_class = ProgressBar
        self._bar: ProgressBar | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or self._bar.label != stage:
            self.close()
            self._bar = self._bar_class(stage, unit="B" if stage == "merging" else "steps")
        self._bar(done, total)

    def close(self) -> None:
        """End the line of the last bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


COMMAND = Command(
    summary="export a model to ONNX",
    description="Export a merged model, or a base with an adapter, to ONNX. ONNX Runtime must give what PyTorch "
    "gives before the output directory appears; export_report.json in it holds the differences.",
    group="export",
    add_arguments=_add_arguments,
    run=_run,
    examples=(
        "doran export --model merged --out onnx",
        "doran export --base base --adapter run/adapter --out onnx --precision fp16",
        "doran export --base base --multi-adapter --adapter en=run-en/adapter --adapter fr=run-fr/adapter --out onnx",
        "doran export --model merged --out onnx --inputs sentences.txt --tolerance 1e-4",
    ),
    notes="Exit code 1: the graph was made and does not compute what PyTorch computes.",
)
