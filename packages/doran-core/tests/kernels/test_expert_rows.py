"""Rows grouped by expert, each scaled by its expert's c: every implementation against a loop in float64."""

import cases
import pytest
import torch

from doran_core.kernels import use_backend
from doran_core.kernels.expert_rows import scale_expert_rows

ENDS = {
    "some": [3, 40, 57, 64, 90],
    "none for the first, the middle and the last": [0, 70, 70, 90, 90],
    "rows after the last end": [10, 20, 20, 30, 40],
    "one expert": [90],
    "no end reached": [0, 0, 0],
}


def computed(z, delta, scale, ends, grad):
    inputs = [tensor.clone().requires_grad_() for tensor in (z, delta, scale)]
    y = scale_expert_rows(*inputs, ends)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def in_float64(z, delta, scale, ends, grad):
    inputs = [tensor.double().cpu().requires_grad_() for tensor in (z, delta, scale)]
    z, delta, scale = inputs
    limits = [*ends.tolist()[:-1], len(z)]
    starts = [0, *limits[:-1]]
    parts = zip(scale, starts, limits, strict=True)
    y = torch.cat([c * z[first:last] + delta[first:last] for c, first, last in parts])
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.double().cpu())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ENDS)
def test_output_and_gradients(name, dtype, implementation, device):
    if cases.INTERPRETED and implementation == "triton" and dtype != torch.float32 and name != "some":
        pytest.skip("the interpreter is slow")
    d_out = 40 if cases.INTERPRETED else 200
    ends = torch.tensor(ENDS[name], dtype=torch.int32, device=device)
    z, delta, grad = (torch.randn(90, d_out, device=device).to(dtype) for _ in range(3))
    scale = torch.rand(len(ends), d_out, device=device) + 0.5
    arguments = z, delta, scale, ends, grad
    with use_backend(implementation):
        found = computed(*arguments)
    assert found[0].dtype == dtype
    for ours, exact in zip(found, in_float64(*arguments), strict=True):
        assert cases.error(ours, exact) < cases.TOLERANCE[dtype]


def test_no_rows(implementation, device):
    empty = torch.randn(0, 8, device=device)
    with use_backend(implementation):
        y, *_, of_scale = computed(
            empty, empty, torch.ones(3, 8, device=device), torch.zeros(3).int().to(device), empty
        )
    assert y.shape == (0, 8)
    assert not of_scale.any()


def test_second_derivatives(implementation, device):
    """Of ``sum (c z + delta)^2`` by z and then by c: ``4 c z + 2 delta``, summed over an expert's rows."""
    z, delta = torch.randn(2, 6, 4, device=device).unbind()
    z, scale = z.clone().requires_grad_(), torch.rand(2, 4, device=device).requires_grad_()
    with use_backend(implementation):
        y = scale_expert_rows(z, delta, scale, torch.tensor([2, 6], device=device))
        (of_z,) = torch.autograd.grad(y.square().sum(), z, create_graph=True)
        (of_scale,) = torch.autograd.grad(of_z.sum(), scale)
    rows = 4 * scale[[0, 0, 1, 1, 1, 1]] * z + 2 * delta
    assert torch.allclose(of_scale, torch.stack([rows[:2].sum(0), rows[2:].sum(0)]), atol=1e-5)
