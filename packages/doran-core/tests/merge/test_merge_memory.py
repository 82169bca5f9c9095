"""A merge holds pieces of tensors, never a shard: its peak stays far below the checkpoint's size."""

import json
import subprocess
import sys
from pathlib import Path

import made
import pytest
import torch

MEASURE = """
import sys, torch
from pathlib import Path
from doran_core.merge import merge_checkpoint

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
merge_checkpoint("base", "adapter", "out")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure the peak")
def test_peak_memory(tmp_path):
    names = [f"model.layers.{index}.q_proj" for index in range(4)]
    weights = {f"{name}.weight": torch.ones(4096, 4096, dtype=torch.bfloat16) for name in names}
    weights["model.embed.weight"] = torch.ones(32768, 4096, dtype=torch.bfloat16)
    made.write_base(tmp_path / "base", weights, shards=1)
    made.write_adapter(tmp_path / "adapter", weights, targets=names)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
    assert size > 400e6
    assert json.loads(done.stdout) < 120e6
