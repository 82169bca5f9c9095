"""Serving on a GPU: kernels, equality with merged checkpoints, throughput and latency, swap time.

    python benchmarks/serve.py --out DIR [--parts kernel-tests kernels equal-fp32 equal-merged near-bf16 speed swap]

Each part is a process with a time limit of its own; results are printed as JSON lines as they come and appended to
DIR/serve.jsonl. A part that is complete there is not run again, nor is a case of `speed`. vLLM has to be importable.
Packages of this repository may be on PYTHONPATH without being installed: the plugin's entry point is then supplied
from a temporary folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = [HERE.parent / "packages" / name / "src" for name in ("doran-core", "doran-serve")]
PARTS = {
    "kernel-tests": ("serve_kernels.py", 120),
    "equal-fp32": ("serve_equal.py", 170),
    "equal-merged": ("serve_equal.py", 120),
    "near-bf16": ("serve_near.py", 150),
    "kernels": ("serve_kernels.py", 150),
    "speed": ("serve_speed.py", 540),
    "swap": ("serve_speed.py", 150),
}
"""Script and seconds that it may take."""


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """The environment of a part: sources on the path, the plugin's entry point, vLLM without network."""
    with tempfile.TemporaryDirectory() as folder:
        path = [str(source) for source in SOURCES]
        if "doran" not in importlib.metadata.entry_points(group="vllm.general_plugins").names:
            info = Path(folder, "doran_serve-0.1.0.dist-info")
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: doran-serve\nVersion: 0.1.0\n")
            (info / "entry_points.txt").write_text("[vllm.general_plugins]\ndoran = doran_serve.plugin:register\n")
            path.append(folder)
        if os.environ.get("PYTHONPATH"):
            path.append(os.environ["PYTHONPATH"])
        defaults = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "TRITON_F32_DEFAULT": "ieee",  # float32 is float32 in attention, too
        }
        yield defaults | os.environ | {"PYTHONPATH": os.pathsep.join(path), "DORAN_CACHE_DIR": f"{folder}/cache"}


def run(part: str, limit: float, out: Path, variables: dict[str, str]) -> None:
    """One part in a process of its own; its results go to the file as they come."""
    begin = time.perf_counter()
    with (out / "serve.jsonl").open("a") as file, (out / f"{part}.log").open("w") as log:

        def keep(line: str) -> None:
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        command = [sys.executable, str(HERE / PARTS[part][0]), part]
        process = subprocess.Popen(
            ["timeout", "--kill-after=5", str(limit), *command],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("RESULT "):
                    keep(line.removeprefix("RESULT ").rstrip())
                else:
                    print(line.rstrip(), flush=True)
            code = process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        seconds = round(time.perf_counter() - begin, 1)
        keep(json.dumps({"part": part, "ended": code, "seconds": seconds}))
    if code:
        print((out / f"{part}.log").read_text()[-4000:], flush=True)


def complete(out: Path) -> set[str]:
    """Parts that have ended well before."""
    lines = (out / "serve.jsonl").read_text().splitlines() if (out / "serve.jsonl").exists() else []
    return {entry["part"] for entry in map(json.loads, lines) if entry.get("ended") == 0}


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "serve-results")))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--cases", nargs="+", help="of the part `speed`: base, lora, 'doran mixed', 'doran merged'")
    parser.add_argument("--budget", type=float, default=580, help="seconds for all parts")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget
    with environment() as variables:
        variables["DORAN_BENCH_RESULTS"] = str((args.out / "serve.jsonl").resolve())
        variables["DORAN_BENCH_CASES"] = ",".join(args.cases or [])
        for part in args.parts:
            left = deadline - time.monotonic()
            if part in complete(args.out) and not (part == "speed" and args.cases):
                print(f"{part}: complete in {args.out}", flush=True)
            elif left < 30:
                print(f"{part}: no time left", flush=True)
            else:
                run(part, min(left, PARTS[part][1]), args.out, variables)


if __name__ == "__main__":
    main()
