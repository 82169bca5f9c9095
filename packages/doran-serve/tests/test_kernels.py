"""Runs `kernel_cases`: on a GPU if there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, and vLLM imports it: so in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


def test_kernels() -> None:
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("kernel_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(cases)],
        env=os.environ | interpreter,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
