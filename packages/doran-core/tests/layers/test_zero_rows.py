"""A weight with rows of zeros, as pruned or padded projections have: finite everywhere, and trainable where tau is."""

import oracle
import pytest
import torch
from torch import nn

from doran_core import DoranConfig
from doran_core.kernels.backend import use_backend
from doran_core.layers import DoranLinear

ROWS = torch.arange(0, 12, 3)
KINDS = [
    {"tau_kind": "learned"},
    {"tau_kind": "learned", "tau_granularity": "row"},
    {"tau_kind": "fixed"},
    {"tau_kind": "gaussian"},
    {"tau_kind": "zero"},
    {"tau_kind": "zero", "norm_grad": "detached", "factors": "static"},
    {"tau_kind": "learned", "norm_method": "direct"},
    {"tau_kind": "zero", "norm_method": "factored"},
]


def layer_and_base(options, rows=ROWS, dtype=torch.float32):
    torch.manual_seed(0)
    base = nn.Linear(16, 12).to(dtype)
    with torch.no_grad():
        base.weight[rows] = 0.0
    return DoranLinear(base, DoranConfig(rank=4, **options)), base


def train(layer, steps=3):
    """Adam on a loss that wants every output moved; every gradient on the way is looked at."""
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(7, 16, dtype=layer.base_layer.weight.dtype, requires_grad=True)
        (layer(x) - 3.0).square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.requires_grad]
        assert all(bool(gradient.isfinite().all()) for gradient in [*gradients, x.grad])
        optimizer.step()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_output_gradients_and_merge_are_finite(options, backend):
    if backend == "torch" and options.get("norm_method") == "direct":
        backend = "reference"
    layer, base = layer_and_base(options)
    x = torch.randn(5, 16)
    with use_backend(backend):
        layer.eval()
        assert torch.equal(layer(x), base(x))
        layer.train()
        train(layer)
        layer.eval()
        adapter = layer.doran_adapter
        merged = adapter.merged_weight(base.weight)
        expected = x.double() @ merged.T + base.bias.double()
        assert bool(merged.isfinite().all())
        assert torch.allclose(layer(x).double(), expected, atol=1e-5)
    moved = merged[ROWS].abs().sum(1)
    if options["tau_kind"] == "zero":
        assert not moved.any()  # 0 / 0 is taken as 0: such a row stays 0
    else:
        assert bool((moved > 0).all())


@pytest.mark.parametrize("tau_kind", ["learned", "fixed"])
def test_a_trained_zero_row_is_the_formulas(tau_kind):
    layer, base = layer_and_base({"tau_kind": tau_kind}, dtype=torch.float64)
    train(layer)
    layer.eval()
    adapter = layer.doran_adapter
    A, B = (factor.detach() for factor in adapter.factor_pair())
    expected = oracle.merged(base.weight, A, B, adapter.scaling, adapter.magnitude, adapter.tau.value())
    assert torch.allclose(adapter.merged_weight(base.weight), expected, atol=1e-12)
    # m starts at tau there, so that the row learns as a row of a LoRA would: c = 1 to first order.
    fresh, _ = layer_and_base({"tau_kind": tau_kind}, dtype=torch.float64)
    assert torch.equal(fresh.doran_adapter.magnitude[ROWS], fresh.doran_adapter.tau.value().expand(len(ROWS)))


@pytest.mark.parametrize("tau_kind", ["learned", "zero"])
def test_a_weight_of_zeros_alone(tau_kind):
    layer, base = layer_and_base({"tau_kind": tau_kind}, rows=torch.arange(12))
    x = torch.randn(5, 16)
    assert torch.equal(layer(x), base(x))
    train(layer)
    assert bool(layer.doran_adapter.merged_weight(base.weight).isfinite().all())
