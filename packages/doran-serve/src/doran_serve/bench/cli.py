"""`doran bench-serve`: throughput and latency of base, LoRA and DoRAN on this machine. Imports no vLLM."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from doran_core.cli.command import Command, Outcome
from doran_core.errors import DoranError

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    parser.add_argument("base", metavar="BASE_DIR", help="base model")
    parser.add_argument(
        "--adapters", type=Path, required=True, metavar="DIR", help="directory of DoRAN adapters; up to 8 are used"
    )
    parser.add_argument("--requests", type=int, default=128, help="sent together (default: 128)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each request (default: 128)")
    parser.add_argument("--output-tokens", type=int, default=128, help="of each request (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, help="the median counts (default: 5)")
    parser.add_argument(
        "--engine",
        metavar="JSON",
        type=json.loads,
        default={},
        help='arguments of vLLM\'s LLM for all cases, e.g. \'{"dtype": "bfloat16"}\'',
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="add every round's numbers to this file, a line each")


def _run(args: argparse.Namespace) -> Outcome:
    from doran_serve import flags
    from doran_serve.base import local_directory
    from doran_serve.bench.cases import Workload, standard_cases
    from doran_serve.bench.run import measure, summary, table
    from doran_serve.bench.strip import write_lora
    from doran_serve.launch import cache_size, find_adapters
    from doran_serve.store import AdapterStore

    if not isinstance(args.engine, dict):
        raise DoranError(f"--engine {args.engine!r} is no JSON object")
    store = AdapterStore(local_directory(args.base))
    doran = list(find_adapters(args.adapters).values())[: flags.MOST_SLOTS]
    os.environ.update(cache_size(bool({"gpu_memory_utilization", "kv_cache_memory_bytes"} & args.engine.keys())))
    workload = Workload(args.requests, args.prompt_tokens, args.output_tokens, args.rounds)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        lora, rank = [], 1
        for index, path in enumerate(doran):
            adapter = store.load(path)
            if adapter is None:
                raise DoranError(f"{path}: of a kind that only vLLM reads; it has no LoRA part to compare with")
            rank = max(rank, adapter.rank)
            lora.append(str(write_lora(adapter, Path(folder, f"{index}"))))
        dorans = [str(path.resolve()) for path in doran]
        cases = standard_cases(args.base, args.engine, lora, dorans, flags.served_rank(rank))
        for case in cases:
            for result in measure(case, workload):
                results.append(result)
                print(json.dumps(result), flush=True)
                if args.log:
                    with args.log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(result) + "\n")
    medians = summary(results)
    return Outcome({"medians": medians, "rounds": results}, [table(medians)])


COMMAND = Command(
    summary="measure base, LoRA and DoRAN serving on this machine",
    description="Throughput and latency of the base, of the adapters' LoRA part on stock vLLM, of DoRAN in mixed "
    "and in merged mode, one after the other on random prompts; medians and ratios.",
    group="serve",
    add_arguments=_add_arguments,
    run=_run,
    examples=(
        "doran bench-serve base --adapters adapters",
        'doran bench-serve base --adapters adapters --requests 32 --rounds 3 --engine \'{"dtype": "bfloat16"}\'',
        "doran bench-serve base --adapters adapters --requests 8 --output-tokens 32 --rounds 3   # on a CPU",
    ),
)
