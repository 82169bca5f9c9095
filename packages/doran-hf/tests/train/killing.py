"""`doran train` in a process that is killed once it has written a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch


def train_and_kill(arguments: list[str], checkpoint: Path, step_seconds: float) -> None:
    """Start `doran train ARGUMENTS`, and send SIGKILL when `checkpoint` is there.

    Steps are slowed down, so that it dies in the middle. As many threads as in this process: sums in the same order.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "doran_core.cli", "train", *arguments],
        env=os.environ
        | {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "DORAN_TEST_SLOW_STEPS": str(step_seconds),
            "PYTHONPATH": str(Path(__file__).parent / "slow"),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (checkpoint / "trainer_state.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
