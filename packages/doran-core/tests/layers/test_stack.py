"""A stack of expert weights against an oracle that materialises W' of every expert in float64."""

import oracle
import pytest
import torch
from torch import nn

from doran_core import DoranConfig
from doran_core.errors import ConfigError, TargetError
from doran_core.layers.modules import layer_spec, make_factor_builder
from doran_core.layers.stack import StackAdapter, StackView
from doran_core.method.factors import StaticFactors

E, OUT, IN, RANK = 5, 6, 7, 3
NAME = "model.layers.3.mlp.experts.gate_up_proj"


class Holder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.gate_up_proj = nn.Parameter(weight, requires_grad=False)


def stack(dtype=torch.float64, transposed=False, **options):
    weight = torch.randn(E, IN, OUT, dtype=dtype) if transposed else torch.randn(E, OUT, IN, dtype=dtype)
    view = StackView(Holder(weight), "gate_up_proj", transposed=transposed, name=NAME)
    config = DoranConfig(rank=RANK, target_modules=["gate_up_proj"], **options)
    spec = layer_spec(NAME, view, config)
    adapter = StackAdapter(config, spec, make_factor_builder(config)(spec))
    adapter.initialise(view)
    return view, adapter


def train(adapter):
    """Values away from the start."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def oracle_merged(view, adapter):
    """W' of each expert, differentiable, from the adapter's own factors."""
    A, B = adapter.factor_pair()
    raw = adapter.tau.raw
    tau = torch.zeros(E, OUT) if raw is None else nn.functional.softplus(raw).reshape(-1)
    sizes = {1: (1, 1), E: (E, 1), E * OUT: (E, OUT)}
    tau = tau.reshape(sizes.get(tau.numel(), (E, OUT))).expand(E, OUT)
    return torch.stack(
        [oracle.merged(view.weight()[e], A[e], B[e], adapter.scaling, adapter.magnitude[e], tau[e]) for e in range(E)]
    )


@pytest.mark.parametrize("granularity", ["layer", "expert", "row"])
@pytest.mark.parametrize("factors", ["generated", "static"])
@pytest.mark.parametrize("transposed", [False, True])
def test_starts_at_the_base_weight_exactly(factors, granularity, transposed):
    view, adapter = stack(torch.float32, transposed, factors=factors, tau_granularity=granularity)
    scale, A, scaled_B = adapter.scale_and_factors(view)
    assert torch.equal(scale, torch.ones(E, OUT))
    assert torch.equal(scaled_B, torch.zeros(E, OUT, RANK))
    assert A.shape == (E, RANK, IN)
    assert adapter.tau.raw.numel() == {"layer": 1, "expert": E, "row": E * OUT}[granularity]
    assert all(not torch.equal(A[0], other) for other in A[1:])


@pytest.mark.parametrize("granularity", ["layer", "expert", "row"])
@pytest.mark.parametrize("factors", ["generated", "static"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["auto", "factored", "direct"])
def test_values_and_gradients_equal_the_oracle(factors, granularity, transposed, method):
    options = {"factors": factors, "tau_granularity": granularity, "norm_method": method}
    view, adapter = stack(torch.float64, transposed, **options)
    train(adapter)
    x, weights = torch.randn(E, 4, IN, dtype=torch.float64), torch.randn(E, 4, OUT, dtype=torch.float64)
    scale, A, scaled_B = adapter.scale_and_factors(view)
    y = scale[:, None] * (x @ view.weight().mT) + x @ A.mT @ scaled_B.mT
    (y * weights).sum().backward()
    mine = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    adapter.zero_grad()
    expected = x @ oracle_merged(view, adapter).mT
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    (expected * weights).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-8, atol=1e-10, msg=name)
    torch.testing.assert_close(adapter.merged_weight(view.weight()), oracle_merged(view, adapter).detach())


@pytest.mark.parametrize("factors", ["generated", "static"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_chosen_experts_alone_have_their_norms_and_gradients(factors, dtype, transposed):
    view, adapter = stack(dtype, transposed, factors=factors)
    train(adapter)
    chosen = torch.tensor([3, 0])
    results = []
    for which in (None, chosen):
        adapter.zero_grad()
        scale, _, scaled_B = adapter.scale_and_factors(view, which)
        (scale[chosen].square().sum() + scaled_B[chosen].sum()).backward()
        results.append(
            (scale[chosen], {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None})
        )
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)
    assert not adapter.magnitude.grad[[1, 2, 4]].any()


def test_half_precision_takes_its_norms_in_float32():
    view, adapter = stack(torch.bfloat16, factors="static")
    train(adapter)
    scale, A, _ = adapter.scale_and_factors(view)
    wide = view.weight().double()
    norms = torch.stack([oracle.norm(wide[e], A[e], adapter.factors.B[e], adapter.scaling) for e in range(E)])
    tau = nn.functional.softplus(adapter.tau.raw.double())
    torch.testing.assert_close(scale.double(), adapter.magnitude.double() / (norms + tau), rtol=1e-5, atol=1e-6)


def test_rows_that_cancel_take_the_direct_norm():
    view, adapter = stack(torch.float32, factors="static", tau_kind="zero")
    with torch.no_grad():  # V nearly 0 in one row of one expert
        adapter.factors.B[2, 4] = torch.tensor([1.0, 0.0, 0.0])
        noise = 1e-4 * torch.randn(IN)
        adapter.factors.A[2, 0] = (-view.weight()[2, 4] + noise) / adapter.scaling
        norm = adapter.norm(view, *adapter.factor_pair())
    exact = oracle.norm(view.weight()[2], adapter.factors.A[2], adapter.factors.B[2], adapter.scaling)[4]
    assert norm[2, 4].item() == pytest.approx(exact.item(), rel=1e-3)


def test_detached_norm_is_a_constant():
    view, adapter = stack(torch.float64, factors="static", norm_grad="detached")
    train(adapter)
    scale, _, _ = adapter.scale_and_factors(view)
    scale.sum().backward()
    assert adapter.factors.A.grad is None
    assert adapter.magnitude.grad.abs().min() > 0


def test_experts_share_the_trunk_of_their_block_and_nothing_else():
    config = DoranConfig(rank=RANK, target_modules=["x"])
    builder = make_factor_builder(config)
    view = StackView(Holder(torch.randn(E, OUT, IN)), "gate_up_proj", name=NAME)
    first = builder(layer_spec(NAME, view, config))
    second = builder(layer_spec(NAME.replace("gate_up", "down"), view, config))
    assert first.trunk is second.trunk
    assert first.w2_A.shape == (E, IN, RANK)
    assert first.w2_B.shape == (E, OUT, RANK)
    own = first.w2_A.numel() + first.w2_B.numel()
    static = sum(p.numel() for p in StaticFactors(layer_spec(NAME, view, config)).parameters())
    assert own == static


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_granularity": "head", "head_dim": 2}, "stacked expert weights"),
        ({"experts": True}, "rank-one experts"),
        ({"share_output": True}, "share_output"),
    ],
)
def test_options_that_a_stack_does_not_have_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        stack(**options)


def test_weights_that_are_no_stack_are_refused():
    for weight in (torch.randn(3, 4), torch.zeros(2, 3, 4, dtype=torch.float8_e4m3fn)):
        with pytest.raises(TargetError, match="stacked weights"):
            StackView(Holder(weight), "gate_up_proj", name=NAME)
    with pytest.raises(TargetError, match="no parameter 'down_proj'"):
        StackView(Holder(torch.randn(2, 3, 4)), "down_proj", name=NAME)


def test_a_weight_that_zero3_frees_after_its_layers_pass_is_refused_even_while_it_is_gathered():
    view, adapter = stack()
    getattr(view.layer, view.parameter).ds_id = 0  # DeepSpeed's mark
    with pytest.raises(TargetError, match="its weight is whole only inside its module's own forward"):
        adapter.scale_and_factors(view)
