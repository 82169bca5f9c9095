"""`doran merge`: merges adapters into a checkpoint directory."""

from __future__ import annotations

import sys

import click

from doran_core.cli.command import Outcome, command
from doran_core.cli.options import DIRECTORY, adapter_options, load_factor_builder
from doran_core.errors import ConfigError

__all__ = ["merge"]

_DTYPES = ("bfloat16", "float16", "float32", "float64")


@command(
    group="adapters",
    short_help="merge adapters into a checkpoint",
    examples=(
        "doran merge --base base --adapter run/adapter --out merged",
        "doran merge --base base --adapter a --weight 0.7 --adapter b --weight 0.3 --out merged --dtype bfloat16",
    ),
)
@click.option("--base", required=True, type=DIRECTORY, help="Checkpoint directory (safetensors).")
@click.option(
    "--adapter", "adapters", required=True, multiple=True, type=DIRECTORY, help="Adapter directory; repeat for several."
)
@click.option(
    "--weight", "weights", multiple=True, type=float, help="Weight of each --adapter, in the same order; default 1."
)
@click.option("--out", required=True, type=DIRECTORY, help="Directory to write; must not exist or be empty.")
@click.option("--dtype", type=click.Choice(_DTYPES), help="dtype of the result; default: that of each base tensor.")
@adapter_options
def merge(
    base: str,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    out: str,
    dtype: str | None,
    allow_base_mismatch: bool,
    factor_builder: str | None,
) -> Outcome:
    """Merge adapters into a Hugging Face checkpoint. Memory stays small, because tensors are streamed. To resume a
    killed merge, run the same command again. The output directory appears only when it is complete.
    """
    weights = weights or (1.0,) * len(adapters)
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(adapters)} --adapter and {len(weights)} --weight: give one weight for each")
    import torch

    from doran_core.merge import merge_checkpoint
    from doran_core.support.progress import ProgressBar

    weighted = list(zip(adapters, weights, strict=True))
    with ProgressBar("merging") as progress:
        try:
            written = merge_checkpoint(
                base,
                weighted,
                out,
                dtype=getattr(torch, dtype) if dtype else None,
                allow_base_mismatch=allow_base_mismatch,
                factor_builder=load_factor_builder(factor_builder),
                progress=progress,
            )
        except KeyboardInterrupt:
            progress.close()
            print("doran: the finished part is kept: run the same command again to resume", file=sys.stderr)
            raise
    merged = [{"directory": adapter, "weight": weight} for adapter, weight in weighted]
    data = {"written": str(written), "base": base, "adapters": merged, "dtype": dtype}
    return Outcome(data, [f"wrote {written}"])
