"""`doran export`: a model directory, or a base and an adapter, to a proven ONNX directory.

Imports nothing heavy before the command runs: every `doran` command loads this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from doran_core.cli.command import Outcome, command
from doran_core.cli.options import DIRECTORY, FILE
from doran_core.errors import ConfigError

if TYPE_CHECKING:
    from doran_export.report import ExportReport

__all__ = ["export"]

_TASKS = (
    "text-generation",
    "text-classification",
    "token-classification",
    "fill-mask",
    "image-classification",
    "feature-extraction",
)


@command(
    group="export",
    short_help="export a model to ONNX",
    epilog="Exit code 1: the graph was made, but differs from PyTorch by more than the tolerance.",
    examples=(
        "doran export --model merged --out onnx",
        "doran export --base base --adapter run/adapter --out onnx --precision fp16",
        "doran export --base base --multi-adapter --adapter en=run-en/adapter --adapter fr=run-fr/adapter --out onnx",
        "doran export --model merged --out onnx --inputs sentences.txt --tolerance 1e-4",
    ),
)
@click.option("--model", type=DIRECTORY, help="Merged Hugging Face model directory.")
@click.option("--base", type=DIRECTORY, help="Base model directory; goes with --adapter.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR",
    help="Adapter directory, merged into --base first; with --multi-adapter NAME=DIR, once or more.",
)
@click.option(
    "--multi-adapter",
    is_flag=True,
    help="Write the base's graph once, with adapters as inputs, and each adapter as a small .onnx_adapter file.",
)
@click.option("--out", required=True, type=DIRECTORY, help="Directory to write; must not exist or be empty.")
@click.option("--task", metavar="NAME", help=f"Kind of model; default: by its architecture. {', '.join(_TASKS)}.")
@click.option(
    "--exporter",
    "--road",  # its old name
    metavar="NAME",
    help="Exporter: genai (onnxruntime-genai's model builder; the default for decoders) or torch.",
)
@click.option(
    "--precision", default="fp32", metavar="NAME", help="fp32 (default), fp16, bf16, int8, or with genai int4."
)
@click.option(
    "--target",
    metavar="NAME",
    help="Device of the graph, cpu or cuda (default: this machine's best); decides the arithmetic of fp16.",
)
@click.option(
    "--provider", "providers", multiple=True, metavar="NAME", help="Prove on cpu or cuda only (may be given twice)."
)
@click.option("--inputs", type=FILE, help="Inputs to compare on beside random ones: .txt, a text per line, or .npz.")
@click.option("--tolerance", type=float, help="Allowed difference from PyTorch; default: by precision, see README.")
def export(
    model: str | None,
    base: str | None,
    adapters: tuple[str, ...],
    multi_adapter: bool,
    out: str,
    task: str | None,
    exporter: str | None,
    precision: str,
    target: str | None,
    providers: tuple[str, ...],
    inputs: str | None,
    tolerance: float | None,
) -> Outcome:
    """Export a merged model, or a base with an adapter, to ONNX. The output directory appears only if
    ONNX Runtime agrees with PyTorch; its export_report.json lists every difference.
    """
    if (model is None) == (base is None):
        raise click.UsageError("give one of --model and --base.", click.get_current_context())
    adapter, named = _adapters(adapters, multi_adapter=multi_adapter)
    from doran_export.api import export as export_model
    from doran_export.proof.cases import read_inputs

    with _Stages() as progress:
        report = export_model(
            model,
            out,
            base=base,
            adapter=adapter,
            adapters=named,
            task=task,
            exporter=exporter,
            providers=list(providers) or None,
            precision=precision,
            target=target,
            inputs=read_inputs(Path(inputs)) if inputs else (),
            tolerance=tolerance,
            progress=progress,
        )
    return Outcome({"directory": str(report.directory), **report.to_dict()}, _shown(report))


def _shown(report: ExportReport) -> list[str]:
    proof = report.proof
    size = sum(report.files.values()) / 1e6
    what = f"{report.architecture}, {report.task}, {report.precision} for {report.target}, by {report.exporter}"
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


def _adapters(given: Sequence[str], *, multi_adapter: bool) -> tuple[str | None, dict[str, str] | None]:
    """The adapter to merge, or the separate adapters by name."""
    if not multi_adapter:
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
