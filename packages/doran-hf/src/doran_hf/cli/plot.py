"""`doran plot`: a run's tau, norms, ranks and gradients over its steps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from doran_core.cli.command import Command, Outcome
from doran_core.errors import CheckpointError

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    parser.add_argument("run", metavar="RUN_DIR", help="directory of a run, or its layers.parquet")
    parser.add_argument("--out", metavar="FILE", help="image to write (default: layers.png in RUN_DIR)")


def _run(arguments: argparse.Namespace) -> Outcome:
    from doran_hf.layer_table import FILE_NAME, read_states
    from doran_hf.plot import plot_states

    run = Path(arguments.run)
    file = run / FILE_NAME if run.is_dir() else run
    if not file.is_file():
        raise CheckpointError(f"{run}: no {FILE_NAME} there; expected the output directory of a `doran train`")
    out = Path(arguments.out) if arguments.out else file.with_suffix(".png")
    states = read_states(file)
    written = plot_states(states, out, title=file.resolve().parent.name)
    return Outcome({"written": str(written), "rows": len(states)}, [f"wrote {written}"])


COMMAND = Command(
    summary="draw what the layers did in training",
    description="Draw tau, norm, output scale, effective rank and gradient split of each layer from the "
    "layers.parquet that `doran train` or LayerMetricsCallback wrote. Needs matplotlib and pyarrow.",
    group="train",
    add_arguments=_add_arguments,
    run=_run,
    examples=("doran plot run", "doran plot run/layers.parquet --out layers.svg"),
)
