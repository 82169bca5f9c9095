"""The harness: mutated inputs, kills, races, full disks and resource limits, with a seed, a budget and a report.

    python tests/faults/run.py --inputs 20000 --kills 200 --seconds 600

Exit code 1 if anything did not hold. What failed is kept in faults-failures/, each with its seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from inputs import throw
from kills import kill_writers
from legal import write_all
from memory import memory
from pressure import full_disks, limits, readers_and_writers, two_writers
from readers import warm_up
from real import write_model

BAD = ("crashes", "hangs", "other_errors", "silent", "wrong", "left_over", "lost", "mixed", "raised", "over")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="mutated inputs")
    parser.add_argument("--kills", type=int, default=200, help="writers to kill")
    parser.add_argument("--seconds", type=float, default=600.0, help="time for the mutated inputs at most")
    parser.add_argument("--races", type=float, default=20.0, help="seconds of readers and writers at once")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of everything drawn at random")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--failures", type=Path, default=Path("faults-failures"), help="where to keep what failed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {options.seed}", flush=True)
    report = {}
    with tempfile.TemporaryDirectory(prefix="doran-legal-") as folder:
        legal = Path(folder)
        write_all(legal)
        write_model(legal)
        (legal / "warm").mkdir()
        warm_up(legal, legal / "warm")
        steps = {
            "kills": lambda: kill_writers(legal, options.kills),
            "races": lambda: readers_and_writers(legal, options.races),
            "two writers": lambda: two_writers(legal, options.races / 4),
            "full disks": lambda: full_disks(legal),
            "limits": lambda: limits(legal),
            "memory": lambda: memory(legal),
            "inputs": lambda: throw(
                legal, options.inputs, options.seed, options.seconds, options.failures, options.workers
            ),
        }
        for name, step in steps.items():
            begin = time.monotonic()
            report[name] = step()
            print(f"{name}: {json.dumps(report[name])} ({time.monotonic() - begin:.0f} s)", flush=True)
    bad = {f"{name}: {what}": count for name, found in report.items() for what in BAD if (count := found.get(what))}
    print("all held" if not bad else f"did not hold: {bad}; see {options.failures}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
