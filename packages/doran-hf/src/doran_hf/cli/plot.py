"""`doran plot`: a run's tau, norms, ranks and gradients over its steps."""

from __future__ import annotations

import argparse
from pathlib import Path

from doran_core.errors import CheckpointError
from doran_hf.layer_table import FILE_NAME, read_states
from doran_hf.plot import plot_states

__all__ = ["register"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "plot",
        help="draw what the layers did in training",
        description="Draw tau, norm, output scale, effective rank and gradient split of each layer from the "
        f"{FILE_NAME} that `doran train` or LayerMetricsCallback wrote. Needs matplotlib and pyarrow.",
    )
    parser.add_argument("run", metavar="RUN", help=f"directory of a run, or its {FILE_NAME}")
    parser.add_argument("--out", metavar="FILE", help="image to write (default: layers.png in RUN)")
    parser.set_defaults(func=_run)


def _run(arguments: argparse.Namespace) -> int:
    run = Path(arguments.run)
    file = run / FILE_NAME if run.is_dir() else run
    if not file.is_file():
        raise CheckpointError(f"{run}: no {FILE_NAME} there; expected the output directory of a `doran train`")
    out = Path(arguments.out) if arguments.out else file.with_suffix(".png")
    states = read_states(file)
    print(f"wrote {plot_states(states, out, title=file.resolve().parent.name)}")
    return 0
