"""`doran convert`: an adapter from one form to another."""

from __future__ import annotations

import argparse

from doran_core.adapter import write_compiled
from doran_core.cli.options import add_adapter_options, load_factor_builder
from doran_core.convert import compile_adapter, to_peft_dora
from doran_core.progress import ProgressBar

__all__ = ["register"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="convert an adapter to another form",
        description="Convert an adapter: trainable DoRAN, compiled DoRAN, PEFT LoRA or PEFT DoRA, to the compiled form "
        "or to a plain PEFT DoRA directory. The function that it computes stays the same.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter directory")
    parser.add_argument("--to", required=True, choices=["compiled", "peft-dora"], help="form to write")
    parser.add_argument("--base", required=True, metavar="DIR", help="checkpoint directory that the adapter adapts")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is in --out already")
    add_adapter_options(parser)
    parser.set_defaults(func=_run)


def _run(arguments: argparse.Namespace) -> int:
    with ProgressBar("compiling", unit="modules") as progress:
        compiled = compile_adapter(
            arguments.adapter,
            arguments.base,
            allow_base_mismatch=arguments.allow_base_mismatch,
            factor_builder=load_factor_builder(arguments.factor_builder),
            progress=progress,
        )
    write = write_compiled if arguments.to == "compiled" else to_peft_dora
    print(f"wrote {write(compiled, arguments.out, overwrite=arguments.overwrite)}")
    return 0
