"""`doran convert`: converts an adapter from one form to another."""

from __future__ import annotations

from typing import Any

import click

from doran_core.cli.command import Outcome, command
from doran_core.cli.options import DIRECTORY, adapter_options, load_factor_builder

__all__ = ["convert"]


class _Form(click.Choice[str]):
    """The values of --to, and "compiled", the former name of "folded"."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert("folded" if value == "compiled" else value, param, ctx)


@command(
    group="adapters",
    short_help="convert an adapter to another form",
    examples=(
        "doran convert run/adapter --to folded --base base --out folded",
        "doran convert run/adapter --to peft-dora --base base --out dora    # for PEFT",
    ),
)
@click.argument("adapter", metavar="ADAPTER_DIR", type=DIRECTORY)
@click.option("--to", "form", required=True, type=_Form(["folded", "peft-dora"]), help="Form to write.")
@click.option("--base", required=True, type=DIRECTORY, help="Checkpoint directory that the adapter adapts.")
@click.option("--out", required=True, type=DIRECTORY, help="Directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace an adapter in --out.")
@adapter_options
def convert(
    adapter: str,
    form: str,
    base: str,
    out: str,
    overwrite: bool,
    allow_base_mismatch: bool,
    factor_builder: str | None,
) -> Outcome:
    """Convert an adapter (trainable DoRAN, folded DoRAN, PEFT LoRA or PEFT DoRA) to the folded form or to a plain
    PEFT DoRA directory. The converted adapter computes the same function.
    """
    from doran_core.adapter import write_folded
    from doran_core.convert import fold_adapter, to_peft_dora
    from doran_core.support.progress import ProgressBar

    with ProgressBar("folding", unit="modules") as progress:
        folded = fold_adapter(
            adapter,
            base,
            allow_base_mismatch=allow_base_mismatch,
            factor_builder=load_factor_builder(factor_builder),
            progress=progress,
        )
    write = write_folded if form == "folded" else to_peft_dora
    written = write(folded, out, overwrite=overwrite)
    return Outcome({"written": str(written), "form": form}, [f"wrote {written}"])
