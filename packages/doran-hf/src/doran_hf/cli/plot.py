"""`doran plot`: draws a run's tau, norms, ranks and gradients over its steps."""

from __future__ import annotations

from pathlib import Path

import click

from doran_core.cli.command import Outcome, command
from doran_core.cli.options import FILE
from doran_core.errors import CheckpointError

__all__ = ["plot"]


@command(
    group="train",
    short_help="draw the layers' metrics over a training",
    examples=("doran plot run", "doran plot run/layers.parquet --out layers.svg"),
)
@click.argument("run", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option("--out", type=FILE, help="Image to write (default: layers.png in RUN_DIR).")
def plot(run: Path, out: str | None) -> Outcome:
    """Draw tau, norm, output scale, effective rank and gradient split of each layer over the steps of a run. RUN_DIR is
    the run's directory, or the layers.parquet that `doran train` or LayerMetricsCallback wrote. Needs matplotlib and
    pyarrow.
    """
    from doran_hf.layer_table import FILE_NAME, read_states
    from doran_hf.plot import plot_states

    file = run / FILE_NAME if run.is_dir() else run
    if not file.is_file():
        raise CheckpointError(f"{run}: no {FILE_NAME} there; expected the output directory of a `doran train`")
    states = read_states(file)
    written = plot_states(states, Path(out) if out else file.with_suffix(".png"), title=file.resolve().parent.name)
    return Outcome({"written": str(written), "rows": len(states)}, [f"wrote {written}"])
