"""`doran bench-serve`: throughput and latency of base, LoRA and DoRAN on this machine. Imports no vLLM."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from doran_core.cli.command import Outcome, command
from doran_core.errors import DoranError

__all__ = ["bench_serve"]


@command(
    name="bench-serve",
    group="serve",
    short_help="measure base, LoRA and DoRAN serving on this machine",
    examples=(
        "doran bench-serve base --adapters adapters",
        'doran bench-serve base --adapters adapters --requests 32 --rounds 3 --engine \'{"dtype": "bfloat16"}\'',
        "doran bench-serve base --adapters adapters --requests 8 --output-tokens 32 --rounds 3   # on a CPU",
    ),
)
@click.argument("base", metavar="BASE_DIR")
@click.option(
    "--adapters",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Directory of DoRAN adapters; up to 8 are used.",
)
@click.option("--requests", type=int, default=128, help="Requests, sent together (default: 128).")
@click.option("--prompt-tokens", type=int, default=128, help="Tokens of each prompt (default: 128).")
@click.option("--output-tokens", type=int, default=128, help="Tokens of each answer (default: 128).")
@click.option("--rounds", type=int, default=5, help="Rounds; results are medians (default: 5).")
@click.option(
    "--engine",
    "engine_json",
    metavar="JSON",
    default="{}",
    help='Arguments of vLLM\'s LLM for all cases, e.g. \'{"dtype": "bfloat16"}\'.',
)
@click.option(
    "--log",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Append every round's numbers to this file, one line each.",
)
def bench_serve(
    base: str,
    adapters: Path,
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
    engine_json: str,
    log: Path | None,
) -> Outcome:
    """Measure throughput and latency of the base, of the adapters' LoRA part on stock vLLM, of DoRAN in mixed and in
    merged mode, one after the other on random prompts. Prints medians and ratios.
    """
    engine = _engine_arguments(engine_json)
    from doran_serve import flags
    from doran_serve.base import local_directory
    from doran_serve.bench.cases import Workload, standard_cases
    from doran_serve.bench.run import measure, summary, table
    from doran_serve.bench.strip import write_lora
    from doran_serve.launch import cache_size, find_adapters
    from doran_serve.store import AdapterStore

    store = AdapterStore(local_directory(base))
    doran = list(find_adapters(adapters).values())[: flags.MOST_SLOTS]
    os.environ.update(cache_size(bool({"gpu_memory_utilization", "kv_cache_memory_bytes"} & engine.keys())))
    workload = Workload(requests, prompt_tokens, output_tokens, rounds)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        lora, rank = [], 1
        for index, path in enumerate(doran):
            adapter = store.load(path)
            if adapter is None:
                raise DoranError(f"{path}: only vLLM can read this adapter, so it has no LoRA part to compare with")
            rank = max(rank, adapter.rank)
            lora.append(str(write_lora(adapter, Path(folder, f"{index}"))))
        dorans = [str(path.resolve()) for path in doran]
        cases = standard_cases(base, engine, lora, dorans, flags.served_rank(rank))
        for case in cases:
            for result in measure(case, workload):
                results.append(result)
                print(json.dumps(result), flush=True)
                if log:
                    with log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(result) + "\n")
    medians = summary(results)
    return Outcome({"medians": medians, "rounds": results}, [table(medians)])


def _engine_arguments(text: str) -> dict[str, Any]:
    try:
        engine = json.loads(text)
    except ValueError:
        engine = None
    if not isinstance(engine, dict):
        raise DoranError(f"--engine {text!r} is no JSON object")
    return engine
