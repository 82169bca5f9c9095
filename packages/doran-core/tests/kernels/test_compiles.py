"""The kernels compile for real GPUs, which needs none: the interpreter accepts more than the compiler does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest

pytestmark = cases.needs_triton

KERNELS = {
    "expand_kernel",
    "expert_rows_gradient_kernel",
    "expert_rows_kernel",
    "row_scales_kernel",
    "scale_gradient_kernel",
    "weight_product_kernel",
}
SHARED_MEMORY = {80: 163, 89: 99, 90: 227}
"""KiB that a block may have, by compute capability (CUDA programming guide): above it a launch fails."""


@pytest.mark.parametrize(("capability", "dtype"), [(90, "bfloat16"), (89, "float16"), (80, "float32")])
def test_every_launch_compiles_and_fits(capability, dtype, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = str(Path(__file__).parent / "compile_kernels.py")
    run = subprocess.run(
        [sys.executable, script, str(capability), dtype], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    launches = [json.loads(line) for line in run.stdout.splitlines()]
    half_only = {"row_scales_kernel", "weight_product_kernel"}
    assert {launch["kernel"] for launch in launches} == (KERNELS - half_only if dtype == "float32" else KERNELS)
    limit = SHARED_MEMORY[capability] * 1024
    assert [launch for launch in launches if launch["shared"] > limit] == []
