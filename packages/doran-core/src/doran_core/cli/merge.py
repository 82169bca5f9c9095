"""`doran merge`: adapters into a checkpoint directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from doran_core.cli.command import Command, Outcome
from doran_core.cli.options import add_adapter_options, load_factor_builder
from doran_core.errors import ConfigError

__all__ = ["COMMAND"]

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    parser.add_argument("--base", required=True, metavar="DIR", help="checkpoint directory (safetensors)")
    parser.add_argument(
        "--adapter", required=True, action="append", metavar="DIR", help="adapter directory; repeat for several"
    )
    parser.add_argument(
        "--weight", action="append", type=float, metavar="W", help="one per --adapter, in their order; default 1"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the result; default: that of each base tensor")
    add_adapter_options(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    weights = arguments.weight or [1.0] * len(arguments.adapter)
    if len(weights) != len(arguments.adapter):
        raise ConfigError(f"{len(arguments.adapter)} --adapter and {len(weights)} --weight: give one weight for each")
    import torch

    from doran_core.merge import merge_checkpoint
    from doran_core.support.progress import ProgressBar

    adapters = list(zip(arguments.adapter, weights, strict=True))
    with ProgressBar("merging") as progress:
        try:
            out = merge_checkpoint(
                arguments.base,
                adapters,
                arguments.out,
                dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
                allow_base_mismatch=arguments.allow_base_mismatch,
                factor_builder=load_factor_builder(arguments.factor_builder),
                progress=progress,
            )
        except KeyboardInterrupt:
            progress.close()
            print("doran: the finished part is kept: run the same command again to go on", file=sys.stderr)
            raise
    merged = [{"directory": adapter, "weight": weight} for adapter, weight in adapters]
    return Outcome(
        {"written": str(out), "base": arguments.base, "adapters": merged, "dtype": arguments.dtype}, [f"wrote {out}"]
    )


COMMAND = Command(
    summary="merge adapters into a checkpoint",
    description="Merge adapters into a Hugging Face checkpoint. Streamed, so memory stays small; a killed merge "
    "goes on when the same command is run again; the output appears only when it is whole.",
    group="adapters",
    add_arguments=_add_arguments,
    run=_run,
    examples=(
        "doran merge --base base --adapter run/adapter --out merged",
        "doran merge --base base --adapter a --weight 0.7 --adapter b --weight 0.3 --out merged --dtype bfloat16",
    ),
)
