"""tau: positive, of the right size, starts where asked, and random only in training."""

import math

import oracle
import pytest
import torch

from doran_core.errors import ConfigError
from doran_core.method.config import DoranConfig
from doran_core.method.tau import Tau


def make(norm=None, **options):
    tau = Tau(DoranConfig(**options), 12, "layer")
    tau.initialise(torch.linspace(1.0, 2.0, 12) if norm is None else norm)
    return tau


@pytest.mark.parametrize(
    ("granularity", "size", "expected"),
    [
        ("layer", 1, [1.5] * 12),
        ("head", 3, [sum(1 + k / 11 for k in range(4 * h, 4 * h + 4)) / 4 for h in range(3) for _ in range(4)]),
        ("row", 12, [1 + k / 11 for k in range(12)]),
    ],
)
def test_relative_start_is_a_share_of_the_mean_norm_of_each_group(granularity, size, expected):
    tau = make(tau_granularity=granularity, head_dim=4, tau_init=0.25)
    assert tau.raw.shape == (size,)
    assert torch.allclose(tau().expand(12), 0.25 * torch.tensor(expected), rtol=1e-5)


def test_absolute_start_and_softplus():
    tau = make(tau_init=0.7, tau_init_relative=False)
    assert tau().item() == pytest.approx(0.7, rel=1e-6)
    assert tau().item() == pytest.approx(oracle.softplus(tau.raw.item()), rel=1e-6)


def test_learned_is_a_parameter_fixed_a_buffer_zero_nothing():
    assert [name for name, _ in make().named_parameters()] == ["raw"]
    fixed = make(tau_kind="fixed")
    assert list(fixed.parameters()) == []
    assert list(fixed.state_dict()) == ["raw"]
    zero = make(tau_kind="zero")
    assert zero() == 0.0
    assert dict(zero.state_dict()) == {}


def test_it_stays_positive_whatever_the_raw_value():
    tau = make(tau_granularity="row")
    with torch.no_grad():
        tau.raw.copy_(torch.linspace(-80, 80, 12))
    assert (tau() > 0).all()
    tau().sum().backward()
    assert tau.raw.grad.isfinite().all()


@pytest.mark.parametrize("learn", [False, True])
def test_gaussian_draws_a_half_normal_in_training_and_gives_its_mean_at_inference(learn):
    tau = make(tau_kind="gaussian", tau_learn_sigma=learn, tau_init=0.5, tau_init_relative=False)
    assert (len(list(tau.parameters())) == 1) is learn
    draws = torch.stack([tau() for _ in range(20_000)])
    assert draws.min() >= 0
    assert draws.mean().item() == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.02)
    assert draws.std().item() == pytest.approx(0.5 * math.sqrt(1 - 2 / math.pi), rel=0.02)
    tau.eval()
    assert tau().item() == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=1e-6)
    assert torch.equal(tau(), tau())


def test_heads_need_a_head_dim_that_divides():
    for head_dim in (None, 5):
        with pytest.raises(ConfigError, match=r"q_proj.*divides the 12 output rows.*head_dim"):
            Tau(DoranConfig(tau_granularity="head", head_dim=head_dim), 12, "q_proj")
