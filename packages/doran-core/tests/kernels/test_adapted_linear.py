"""Every implementation of a layer against float64 from the formulas: the output and every gradient, in every dtype."""

import cases
import pytest
import torch

from doran_core.kernels import use_backend

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("name", cases.CASES)
def test_output_and_gradients(name, dtype, implementation, device):
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    if implementation == "triton" and cases.INTERPRETED and dtype == torch.float16:
        pytest.skip("the interpreter is slow: of the half precisions it gets bfloat16 alone")
    case = cases.CASES[name]
    layer, x = case.layer(dtype, device), case.x(dtype, device)
    # Half of it along y, so that tau's gradient, one number, is no sum that cancels.
    grad = layer(x).detach()
    grad = grad + torch.randn_like(grad) * grad.std(correction=0)
    expected = cases.answer(layer, x, grad)
    with use_backend("reference"):
        plain = cases.computed(layer, x, grad)
    with use_backend(implementation):
        for _ in range(2 if device == "cuda" else 1):  # a second call on a GPU is launched in another way
            ours = cases.computed(layer, x, grad)
    assert ours[0].dtype == dtype
    wanted = {"y": expected[0]} | expected[1]
    for key, exact in wanted.items():
        value, other = ({"y": found[0]} | found[1] for found in (ours, plain))
        mine, theirs = cases.error(value[key], exact), cases.error(other[key], exact)
        if implementation == "triton" and cases.INTERPRETED and dtype == torch.bfloat16:
            assert mine <= 4 * cases.TOLERANCE[dtype], (key, mine)  # the interpreter cuts bits off instead of rounding
            continue
        assert mine <= max(cases.TOLERANCE[dtype], 1.5 * theirs), (key, mine, theirs)
        if dtype in HALF and exact.numel() > 100:  # of a few numbers, either may be right by luck
            assert mine <= 1.5 * theirs + cases.TOLERANCE[dtype] / 10, (key, mine, theirs)
