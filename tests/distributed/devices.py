"""Where a process computes: on the CPU, or with ``DORAN_TEST_DEVICE=cuda`` each of the two on a GPU of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BACKENDS", "ON_GPUS", "here"]

ON_GPUS = os.environ.get("DORAN_TEST_DEVICE") == "cuda"

BACKENDS = "cpu:gloo,cuda:nccl" if ON_GPUS else "gloo"
"""What joins the processes."""


def here() -> torch.device:
    """The CPU, or this process's GPU: that of its rank, the first for one process."""
    import torch  # a process sets its variables before

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if ON_GPUS else torch.device("cpu")
