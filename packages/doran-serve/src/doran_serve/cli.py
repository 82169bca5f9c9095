"""`doran serve`: check every adapter against the base, then run vLLM's own server with the right flags."""

from __future__ import annotations

from pathlib import Path

import click

from doran_core.cli.command import Outcome, command, wants_json
from doran_core.errors import ConfigError

__all__ = ["publish", "serve"]


@command(
    group="serve",
    short_help="serve a base model with many adapters at once through vLLM",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="Adapters that cannot be served are named and left out; with --check they make the exit code 1. Flags that "
    "doran does not know go to vLLM unchanged, so vLLM refuses a misspelt flag.",
    examples=(
        "doran serve base --adapters adapters",
        "doran serve base --adapters adapters --check --json",
        "doran serve base --adapters adapters --mode merged --port 8001 --dtype bfloat16",
    ),
)
@click.argument("base", metavar="BASE_DIR")
@click.option(
    "--adapters",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of adapters, each in a subdirectory that names it.",
)
@click.option(
    "--mode",
    type=click.Choice(["mixed", "merged"]),
    default="mixed",
    help="mixed: adapters and base in one batch; merged: one at a time, at the base model's speed.",
)
@click.option("--check", is_flag=True, help="Check the adapters and stop.")
@click.pass_context
def serve(ctx: click.Context, base: str, adapters: Path | None, mode: str, check: bool) -> Outcome:
    """Check every adapter, then run `vllm serve BASE` with them. All further flags go to vLLM. BASE_DIR is a directory,
    or a name that vLLM knows.
    """
    from doran_serve import launch

    if base.startswith("-"):
        raise click.UsageError(f"BASE_DIR goes before the flags of vLLM, got {base!r}.", ctx)
    if wants_json() and not check:
        raise ConfigError("--json goes with --check: a running server has no result")
    planned = launch.plan(base, adapters, mode, ctx.args)
    if not check:
        launch.start(planned)
    elif planned.adapters:
        planned.adapters.require_all()
    infos = planned.adapters.infos if planned.adapters else {}
    found = {
        name: {"path": str(info.path), "form": info.form, "rank": info.rank, "layers": info.modules}
        for name, info in infos.items()
    }
    return Outcome({"base": planned.base, "mode": mode, "adapters": found, "vllm_arguments": planned.arguments})


@command(
    group="serve",
    short_help="put an adapter into a directory that is served, in one step",
    examples=(
        "doran publish sentiment/adapter adapters/sentiment",
        "doran publish sentiment/adapter adapters/sentiment --base base",
    ),
)
@click.argument("adapter", metavar="ADAPTER_DIR", type=click.Path(path_type=Path))
@click.argument("target", metavar="TARGET_DIR", type=click.Path(path_type=Path))
@click.option("--base", metavar="BASE_DIR", help="Check the adapter against this base model first.")
def publish(adapter: Path, target: Path, base: str | None) -> Outcome:
    """Copy an adapter to TARGET_DIR; clients request the adapter by this directory's name. An existing adapter is
    replaced in one step, so a running server never sees half of one.
    """
    from doran_serve.publish import publish_adapter

    published = publish_adapter(adapter, target, base)
    return Outcome({"adapter": str(adapter), "published": str(published)})
