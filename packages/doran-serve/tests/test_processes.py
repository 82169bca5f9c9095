"""vLLM's processes end with the one that started them, however that ended."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing, os, signal, sys, time

def child(stubborn):
    from doran_serve import processes
    processes._PERIOD, processes._GRACE = 0.1, 0.5
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    processes.end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    context.Process(target=child, args=(bool(int(sys.argv[2])),), name=sys.argv[1]).start()
    time.sleep(60)
"""


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("name", "stubborn", "ends"), [("EngineCore", 0, True), ("VllmWorker-0", 1, True), ("mine", 0, False)]
)
def test_ends_with_a_killed_parent(name: str, stubborn: int, ends: bool, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script), name, str(stubborn)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert running(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (20 if ends else 2)
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(child) != ends
    if not ends:
        subprocess.run(["kill", "-9", str(child)], check=True)
