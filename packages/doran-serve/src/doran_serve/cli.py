"""`doran serve`: check every adapter against the base, then run vLLM's own server with the right flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from doran_core.cli.command import Command, Outcome
from doran_core.errors import ConfigError

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    parser.add_argument("base", metavar="BASE_DIR", help="base model: a directory, or a name that vLLM knows")
    parser.add_argument(
        "--adapters", type=Path, metavar="DIR", help="directory of adapters, each in a subdirectory that names it"
    )
    parser.add_argument(
        "--mode",
        choices=["mixed", "merged"],
        default="mixed",
        help="mixed: adapters and base in one batch; merged: one at a time, at the base model's speed",
    )
    parser.add_argument("--check", action="store_true", help="check the adapters and stop")


def _run(arguments: argparse.Namespace) -> Outcome:
    from doran_serve import launch

    if arguments.json and not arguments.check:
        raise ConfigError("--json goes with --check: a server that runs has no result")
    planned = launch.plan(arguments.base, arguments.adapters, arguments.mode, arguments.unknown)
    if not arguments.check:
        launch.start(planned)
    infos = planned.adapters.infos if planned.adapters else {}
    adapters = {
        name: {"path": str(info.path), "form": info.form, "rank": info.rank, "layers": info.modules}
        for name, info in infos.items()
    }
    return Outcome(
        {"base": planned.base, "mode": arguments.mode, "adapters": adapters, "vllm_arguments": planned.arguments}
    )


COMMAND = Command(
    summary="serve a base model with many adapters at once through vLLM",
    description="Check every adapter, then run `vllm serve BASE` with them. All further flags go to vLLM.",
    group="serve",
    add_arguments=_add_arguments,
    run=_run,
    passes_unknown=True,
    examples=(
        "doran serve base --adapters adapters",
        "doran serve base --adapters adapters --check --json",
        "doran serve base --adapters adapters --mode merged --port 8001 --dtype bfloat16",
    ),
    notes="Exit code 1: an adapter cannot be served. What is no flag of doran's is handed to vLLM as it stands, so a "
    "misspelt flag is vLLM's to refuse.",
)
