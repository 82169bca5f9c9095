"""The kernels compile for real GPUs, which needs none: the interpreter accepts more than the compiler does."""

import cases
import pytest

pytestmark = cases.needs_triton

FULL_POINTERS = {"B", "squared_norm", "magnitude", "tau", "norm", "scale", "aligned", "sums", "out"}
HALF_POINTERS = {"A", "base_output", "hidden", "bias", "y", "grad", "kept", "scaled", "left"}
FLOATS = {"scaling", "threshold"}
BLOCKS = {"BLOCK_D": 64, "BLOCK_R": 32, "BLOCK_K": 64, "BLOCK_T": 64}
FLAGS = {"TAU_PER_ROW": False, "REPAIR": True, "HAS_BIAS": True, "IS_OUTPUT": True, "WIDEN": False}

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import test_compiles
test_compiles.compile_all({half!r}, {capability!r})
"""


def type_of(kernel, name, half):
    if name == "table":
        return "*i64"
    if name in HALF_POINTERS or (name == "B" and kernel == "expand_kernel"):
        return f"*{half}"
    if name in FULL_POINTERS:
        return "*fp32"
    return "fp32" if name in FLOATS else "i32"


def compile_all(half, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from doran_core.kernels import triton_kernels

    for kernel_name in [n for n in vars(triton_kernels) if n.endswith("_kernel")]:
        kernel = vars(triton_kernels)[kernel_name]
        constants = {n: v for n, v in (BLOCKS | FLAGS | {"PRECISION": "ieee"}).items() if n in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else type_of(kernel_name, n, half) for n in kernel.arg_names}
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert ".entry" in compiled.asm["ptx"], kernel_name
        print(kernel_name, "compiled")


@pytest.mark.parametrize(("half", "capability"), [("bf16", 90), ("fp16", 80), ("fp32", 80)])
def test_every_kernel_compiles(half, capability, tmp_path):
    import os
    import subprocess
    import sys
    from pathlib import Path

    folder = str(Path(__file__).parent)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = PROGRAM.format(folder=folder, half=half, capability=capability)
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("compiled") == 4, run.stdout
