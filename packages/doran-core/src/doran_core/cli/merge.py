"""`doran merge`: adapters into a checkpoint directory."""

from __future__ import annotations

import argparse
import sys

import torch

from doran_core.cli.options import add_adapter_options, load_factor_builder
from doran_core.errors import ConfigError
from doran_core.merge import merge_checkpoint
from doran_core.progress import ProgressBar

__all__ = ["DTYPES", "register"]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "merge",
        help="merge adapters into a checkpoint",
        description="Merge adapters into a Hugging Face checkpoint. Streamed, so memory stays small; a killed merge "
        "goes on when the same command is run again; the output appears only when it is whole.",
    )
    parser.add_argument("--base", required=True, metavar="DIR", help="checkpoint directory (safetensors)")
    parser.add_argument(
        "--adapter", required=True, action="append", metavar="DIR", help="adapter directory; repeat for several"
    )
    parser.add_argument(
        "--weight", action="append", type=float, metavar="W", help="one per --adapter, in their order; default 1"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the result; default: that of each base tensor")
    add_adapter_options(parser)
    parser.set_defaults(func=_run)


def _run(arguments: argparse.Namespace) -> int:
    weights = arguments.weight or [1.0] * len(arguments.adapter)
    if len(weights) != len(arguments.adapter):
        raise ConfigError(f"{len(arguments.adapter)} --adapter and {len(weights)} --weight: give one weight for each")
    with ProgressBar("merging") as progress:
        try:
            out = merge_checkpoint(
                arguments.base,
                list(zip(arguments.adapter, weights, strict=True)),
                arguments.out,
                dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
                allow_base_mismatch=arguments.allow_base_mismatch,
                factor_builder=load_factor_builder(arguments.factor_builder),
                progress=progress,
            )
        except KeyboardInterrupt:
            progress.close()
            print("doran: the finished part is kept: run the same command again to go on", file=sys.stderr)
            raise
    print(f"wrote {out}")
    return 0
