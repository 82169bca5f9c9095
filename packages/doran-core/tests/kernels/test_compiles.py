"""The kernels compile for real GPUs, which needs none: the interpreter accepts more than the compiler does."""

import cases
import pytest

pytestmark = cases.needs_triton

POINTERS = {"product", "gram", "B", "squared_norm", "magnitude", "tau", "norm", "scale", "grad_B", "aligned"} | {
    "factor_grad", "sums", "grad_magnitude", "grad_tau", "raw_tau", "least", "through_norm", "out", "left", "right",
}  # fmt: skip
HALF_POINTERS = {"weight", "A", "scaled_B", "base_output", "hidden", "bias", "y", "grad", "kept", "scaled", "x"} | {
    "grad_product",
    "product_grad",
    "grad_hidden",
    "mixed",
}
ADDRESSES = {"table", "received", "trunks", "ranges", "members", "left_table", "right_table", "out_table"}
FLOATS = {"scaling", "threshold", "slope", "alpha"}
BLOCKS = {
    "BLOCK_M": 64,
    "BLOCK_N": 64,
    "BLOCK_D": 32,
    "BLOCK_R": 32,
    "BLOCK_K": 64,
    "BLOCK_T": 64,
    "BLOCK": 64,
    "R": 16,
    "E": 64,
    "H": 32,
}
FLAGS = {
    "TAU_PER_ROW": False,
    "REPAIR": True,
    "HAS_BIAS": True,
    "OF_OUTPUT": True,
    "DETACH": False,
    "WIDEN": False,
    "RAW_TAU": True,
    "PARTS": 64,
    "AT_ONCE": 2,
    "LEFT": -1,
    "LEFT_WIDTH": 0,
    "RIGHT": 2,
    "RIGHT_WIDTH": 10,
    "OUT": 0,
    "OUT_WIDTH": 4,
    "ADD": True,
}

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import test_compiles
test_compiles.compile_all({half!r}, {capability!r})
"""


def type_of(name, half):
    if name.endswith("_dim"):
        return "i32"
    if name in ADDRESSES:
        return "*i64"
    if name in HALF_POINTERS:
        return f"*{half}"
    if name in POINTERS or name.startswith(("embedding_", "w1_", "w2_", "grad_", "A", "B")):
        return "*fp32"
    return "fp32" if name in FLOATS else "i32"


def compile_all(half, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from doran_core.kernels import triton_fleet, triton_kernels, triton_networks, triton_wide

    known = vars(triton_kernels) | vars(triton_networks) | vars(triton_fleet) | vars(triton_wide)
    for kernel_name in [n for n in known if n.endswith("_kernel")]:
        kernel = known[kernel_name]
        constants = {n: v for n, v in (BLOCKS | FLAGS | {"PRECISION": "ieee"}).items() if n in kernel.arg_names}
        full = "fp32" if kernel_name.startswith("generate") else half
        signature = {n: "constexpr" if n in constants else type_of(n, full) for n in kernel.arg_names}
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
    assert run.stdout.count("compiled") == 17, run.stdout
