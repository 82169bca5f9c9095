"""Compiles the launches of TritonPasses for a GPU that need not be here: ``compile_kernels.py CAPABILITY DTYPE``.

Triton itself derives signatures and specialisations from the tensors and options of each launch. One line of JSON for
each: the kernel and the shared memory of a block. Run it without TRITON_INTERPRET.
"""

import itertools
import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from doran_core.kernels import triton_passes
from doran_core.kernels.passes import Shape

TOKENS = 64


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def compile_launch(kernel, grid, tensors, numbers, **flags):
    compiled = kernel.warmup(*tensors, *numbers, grid=grid, **flags)
    assert compiled.asm["cubin"], kernel.__name__
    print(json.dumps({"kernel": kernel.__name__, "shared": compiled.metadata.shared}))


def launch_layer(passes, dtype, rank, d_out, has_bias):
    z, h, B, c = (torch.empty(size, dtype=dtype) for size in ((TOKENS, d_out), (TOKENS, rank), (d_out, rank), (d_out,)))
    c = c.float()
    bias = torch.empty(d_out, dtype=dtype) if has_bias else None
    passes.expand(z, h, B, c, bias, inplace=has_bias)
    passes.scale_gradient(z, z, c, bias, is_output=has_bias)


def launch_weight_side(passes, dtype, rank, d_out, d_in, tau_per_row, transposed):
    weight = torch.empty(d_in, d_out, dtype=dtype).T if transposed else torch.empty(d_out, d_in, dtype=dtype)
    A, B, rows = torch.empty(1, rank, d_in, dtype=dtype), torch.empty(1, d_out, rank), torch.empty(1, d_out)
    tau = rows if tau_per_row else torch.empty(1, 1)
    shape = Shape([weight], rows, [0.0], dtype, 1.5, False, tau_per_row, passes)
    passes.row_scales(shape, None, A, B, rows, tau)
    passes.add_weight_products(shape, torch.empty(1, rank, d_in), B.to(dtype))


def launch_expert_rows(passes, dtype, d_out):
    z, c, ends = torch.empty(TOKENS, d_out, dtype=dtype), torch.empty(4, d_out), torch.zeros(4, dtype=torch.int32)
    passes.expert_rows(z, z, c, ends)
    passes.expert_rows_gradient(z, z, c, ends)


def main(capability, dtype):
    driver.set_active(NoDevice(capability))
    triton_passes.launch = compile_launch
    passes = triton_passes.TritonPasses()
    for rank in (8, 64):  # the smallest and the largest blocks
        launch_layer(passes, dtype, rank, 256, True)
        launch_weight_side(passes, dtype, rank, 256, 512, True, False)
    launch_expert_rows(passes, dtype, 256)
    if capability < 90:
        return
    for has_bias, d_out in itertools.product((False, True), (123, 256)):
        launch_layer(passes, dtype, 8, d_out, has_bias)
    for tau_per_row, transposed in itertools.product((False, True), repeat=2):
        launch_weight_side(passes, dtype, 8, 256, 512, tau_per_row, transposed)
    launch_weight_side(passes, dtype, 8, 123, 72, True, False)
    torch.backends.cuda.matmul.allow_tf32 = True
    launch_layer(passes, dtype, 8, 256, True)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]))
