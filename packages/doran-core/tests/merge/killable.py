"""A merge slow enough to be killed in the middle, for a process of its own."""

import time

import torch

from doran_core.merge import merge_checkpoint, write


def slow_merge(base, adapter, out, started):
    """Merge in small pieces with a pause after each; `started` is an event set at the beginning."""
    torch.set_num_threads(1)
    write._COPY_BYTES = 1 << 16
    started.set()
    merge_checkpoint(base, adapter, out, progress=lambda done, total: time.sleep(0.002))
