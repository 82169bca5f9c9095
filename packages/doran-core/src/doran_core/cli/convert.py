"""`doran convert`: an adapter from one form to another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from doran_core.cli.command import Command, Outcome
from doran_core.cli.options import add_adapter_options, load_factor_builder

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help="adapter directory")
    parser.add_argument("--to", required=True, choices=["compiled", "peft-dora"], help="form to write")
    parser.add_argument("--base", required=True, metavar="DIR", help="checkpoint directory that the adapter adapts")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is in --out already")
    add_adapter_options(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    from doran_core.adapter import write_compiled
    from doran_core.convert import compile_adapter, to_peft_dora
    from doran_core.support.progress import ProgressBar

    with ProgressBar("compiling", unit="modules") as progress:
        compiled = compile_adapter(
            arguments.adapter,
            arguments.base,
            allow_base_mismatch=arguments.allow_base_mismatch,
            factor_builder=load_factor_builder(arguments.factor_builder),
            progress=progress,
        )
    write = write_compiled if arguments.to == "compiled" else to_peft_dora
    written = write(compiled, arguments.out, overwrite=arguments.overwrite)
    return Outcome({"written": str(written), "form": arguments.to}, [f"wrote {written}"])


COMMAND = Command(
    summary="convert an adapter to another form",
    description="Convert an adapter: trainable DoRAN, compiled DoRAN, PEFT LoRA or PEFT DoRA, to the compiled form "
    "or to a plain PEFT DoRA directory. The function that it computes stays the same.",
    group="adapters",
    add_arguments=_add_arguments,
    run=_run,
    examples=(
        "doran convert run/adapter --to compiled --base base --out compiled",
        "doran convert run/adapter --to peft-dora --base base --out dora    # for PEFT",
    ),
)
