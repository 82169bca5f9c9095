"""The factor networks by hand against autograd on the formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from doran_core import DoranConfig
from doran_core.kernels import networks
from doran_core.kernels.networks import SLOPES, Networks
from doran_core.method.factors import LayerSpec
from doran_core.method.sharing import SharedTrunks

ACTIVATIONS = {"leaky_relu": F.leaky_relu, "relu": F.relu, "identity": lambda x: x}


def factor(embedding: Tensor, w1: Tensor, w2: Tensor, activation: str) -> Tensor:
    """``F W2^T``, from the formula."""
    hidden = ACTIVATIONS[activation](embedding @ w1.T / math.sqrt(w1.shape[1])) / w1.shape[0]
    return hidden @ w2.T


@settings(deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 5), activation=st.sampled_from(sorted(SLOPES)), seed=st.integers(0, 2**16)
)
def test_values_and_gradients_are_those_of_autograd(
    sizes: tuple[int, int, int, int, int], activation: str, seed: int
) -> None:
    rank, width, hidden, d_in, d_out = sizes
    draw = torch.Generator().manual_seed(seed)
    shapes = [(rank, width), (hidden, width), (d_in, hidden), (rank, width), (hidden, width), (d_out, hidden)]
    parameters = Networks(*(torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes))
    A, B = factor(*parameters[:3], activation), factor(*parameters[3:], activation).T
    grad_A = torch.randn(A.shape, generator=draw, dtype=torch.float64)
    grad_B = torch.randn(B.shape, generator=draw, dtype=torch.float64)
    expected = torch.autograd.grad((A * grad_A).sum() + (B * grad_B).sum(), parameters)
    with torch.no_grad():
        by_hand = networks.values(parameters, SLOPES[activation])
        found = networks.gradients(parameters, SLOPES[activation], grad_A, grad_B)
    torch.testing.assert_close(by_hand, (A, B))
    torch.testing.assert_close(tuple(found), expected)


def build(**options: object) -> object:
    config = DoranConfig(rank=4, target_modules=["x"], **options)  # type: ignore[arg-type]
    return SharedTrunks(config).build(LayerSpec("block.0.x", "block.0", 6, 5, 4, 1.0))


@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"depth": 3}])
def test_other_networks_are_left_to_autograd(options: dict[str, object]) -> None:
    assert build(**options).networks() is None  # type: ignore[attr-defined]


def test_networks_with_a_hook_or_of_two_dtypes_are_left_to_autograd() -> None:
    factors = build()
    assert factors.networks() is not None  # type: ignore[attr-defined]
    handle = factors.trunk.A.register_forward_hook(lambda module, args, output: output * 2)  # type: ignore[attr-defined]
    assert factors.networks() is None  # type: ignore[attr-defined]
    handle.remove()
    factors.trunk.double()  # type: ignore[attr-defined]
    assert factors.networks() is None  # type: ignore[attr-defined]
