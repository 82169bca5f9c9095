"""The start of the factor networks: features close to the identity, LoRA's A, LoRA's first steps, off the kink."""

import math
import warnings

import pytest
import torch
from torch import nn

from doran_core import DoranConfig, adapt, load
from doran_core.layers import DoranLinear
from doran_core.method.factors import FactorTrunk, LayerSpec, StaticFactors
from doran_core.method.sharing import SharedTrunks

UNBOUNDED = ["leaky_relu", "relu", "gelu", "silu", "identity"]
WIDTHS = [
    {"rank": 1},
    {"rank": 2},
    {"rank": 3},
    {"rank": 8},
    {"rank": 8, "embedding_dim": 8},
    {"rank": 8, "hidden_dim": 32},
    {"rank": 8, "depth": 3},
    {"rank": 4, "hidden_dim": 12, "depth": 4, "embedding_dim": 64},
    {"rank": 48},
]


def features(config):
    """H of A and of B in float64."""
    return FactorTrunk(config.rank, config).double()()


def condition(H):
    """Largest over smallest singular value, of those that the shape allows."""
    values = torch.linalg.svdvals(H.detach())
    return float(values[0] / values[min(H.shape) - 1])


def spec(name="layers.0.q_proj", *, rank=8, d_in=64, d_out=48):
    return LayerSpec(name, name.rpartition(".")[0], d_in, d_out, rank, 2.0)


@pytest.mark.parametrize("activation", UNBOUNDED)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_the_features_keep_their_rank(widths, activation):
    for seed in range(4):
        torch.manual_seed(seed)
        for H in features(DoranConfig(**widths, activation=activation)):
            assert condition(H) <= 1.02


@pytest.mark.parametrize("hidden_dim", [8, 24])
def test_rows_have_units_of_their_own(hidden_dim):
    H, _ = features(DoranConfig(rank=8, hidden_dim=hidden_dim))
    expected = torch.eye(8, dtype=torch.float64).repeat(1, hidden_dim // 8) * 8 / hidden_dim
    assert (H - expected).abs().max() < 0.02 / 8


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"activation": "tanh"}, math.tanh(1.0) / 8),  # nothing larger can come out of tanh(...) / h
        ({"activation": "tanh", "hidden_dim": 12}, None),
        ({"hidden_dim": 12}, None),
        ({"hidden_dim": 12, "depth": 3}, None),
        ({"hidden_dim": 5}, None),
        ({"depth": 1}, 1.0 / 2),
        ({"depth": 1, "embedding_dim": 12}, None),
    ],
    ids=str,
)
def test_elsewhere_the_rows_are_as_orthogonal_as_can_be(options, value):
    H, _ = features(DoranConfig(rank=8, **options))
    assert condition(H) <= 1.025
    if value is not None:
        assert H.diagonal().mean().item() == pytest.approx(value, rel=1e-6)


def test_the_old_start_is_nearly_of_rank_one():
    def largest_share(H):
        squares = torch.linalg.svdvals(H.detach()).square()
        return float(squares[0] / squares.sum())

    normal, identity = (features(DoranConfig(rank=8, generator_init=kind))[0] for kind in ("normal", "identity"))
    assert largest_share(normal) > 0.5
    assert largest_share(identity) == pytest.approx(1 / 8, rel=0.03)


@pytest.mark.parametrize("widths", [*WIDTHS[2:6], {"rank": 8, "activation": "tanh"}], ids=str)
def test_A_starts_with_the_mean_and_variance_of_loras(widths):
    config = DoranConfig(**widths)
    wide = spec(rank=config.rank, d_in=8192)
    A, B = SharedTrunks(config).build(wide)()
    static, _ = StaticFactors(wide)()
    assert A.var().item() == pytest.approx(static.var().item(), rel=0.03)
    assert abs(A.mean().item()) < 4 * static.std().item() / math.sqrt(A.numel())
    assert not B.any()


def adam_steps(options, which, *, rate=1e-3):
    """First Adam steps of A and B over the rate, with the static factors' gradients: ``(generated, static)`` each."""
    torch.manual_seed(5)
    config = DoranConfig(rank=8, **options)
    factors = SharedTrunks(config).build(spec()).double()
    gradients = [torch.randn_like(factor) for factor in factors()]
    nn.init.normal_(factors.w2_B, std=0.02)  # at B = 0 the trunk of B has no gradient
    before = [factor.detach() for factor in factors()]
    sum((g * factor).sum() for g, factor in zip(gradients, factors(), strict=True)).backward()
    moving = [p for name, p in factors.named_parameters() if which == "all" or name.startswith("w2")]
    torch.optim.Adam(moving, lr=rate, eps=1e-30).step()
    after = [factor.detach() for factor in factors()]
    return [((b - a) / rate, -g.sign()) for a, b, g in zip(before, after, gradients, strict=True)]


@pytest.mark.parametrize("activation", UNBOUNDED)
@pytest.mark.parametrize("hidden_dim", [8, 16])
def test_with_W2_alone_the_first_adam_step_is_loras(activation, hidden_dim):
    for step, static in adam_steps({"activation": activation, "hidden_dim": hidden_dim}, "w2"):
        # Off the identity a gradient near 0 may change its sign, which moves that entry by 2: hence the mean.
        assert (step - static).abs().mean() < 0.015
        assert (step - static).abs().median() < 0.02


def test_with_all_parameters_the_first_adam_step_stays_near_loras():
    def deviations(options):
        return [float((step - static).norm() / static.norm()) for step, static in adam_steps(options, "all")]

    assert max(deviations({})) < 0.15
    assert min(deviations({"generator_init": "normal"})) > 0.8


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
def test_gradients_of_embeddings_and_first_layers_do_not_hang_on_rounding(rank, activation):
    factors = SharedTrunks(DoranConfig(rank=rank, activation=activation)).build(spec(rank=rank))
    nn.init.normal_(factors.w2_B)
    weights = [torch.randn(factor.shape) for factor in factors()]

    def gradients(dtype):
        factors.to(dtype).zero_grad()
        sum((w.to(dtype) * factor).sum() for w, factor in zip(weights, factors(), strict=True)).backward()
        return {name: p.grad.double() for name, p in factors.named_parameters()}

    narrow, wide = gradients(torch.float32), gradients(torch.float64)
    for name, exact in wide.items():
        assert (narrow[name] - exact).norm() <= 1e-5 * exact.norm(), name


def blocks():
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(3)))


@pytest.mark.parametrize("share_output", [False, True])
def test_blocks_of_a_shared_model_start_alike_and_part(share_output):
    model = blocks()
    x, expected = torch.randn(5, 24), blocks()(torch.zeros(1, 24))
    config = DoranConfig(
        rank=4, target_modules="all-linear", sharing="model", share_output=share_output, block_pattern=r"^\d"
    )
    handle = adapt(model, config)
    assert torch.equal(model(torch.zeros(1, 24)), expected)
    generators = [layer.doran_adapter.factors for layer in handle.layers.values()]
    first, *others = [generator._hidden()[0] for generator in generators]
    assert all(torch.equal(first, other) for other in others)
    assert condition(first.detach()) <= 1.02
    optimizer = torch.optim.Adam(handle.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    hidden = [generator._hidden()[1] for generator in generators]
    assert len(generators) == 3
    assert all(not torch.allclose(hidden[i], hidden[j], atol=1e-5) for i in range(3) for j in range(i))


def test_the_embedding_is_never_below_the_rank_by_default_and_is_kept_as_a_number():
    assert DoranConfig(rank=4).embedding_dim == 16
    assert DoranConfig(rank=40).to_dict()["embedding_dim"] == 40
    assert DoranConfig(rank=4, rank_pattern={"q": 24}).embedding_dim == 24
    with pytest.warns(UserWarning, match="embedding_dim=6 is below the rank 8"):
        FactorTrunk(8, DoranConfig(rank=8, embedding_dim=6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FactorTrunk(8, DoranConfig(rank=8, embedding_dim=8))


def test_a_seed_gives_the_same_values_whatever_the_default_dtype_and_device():
    def start():
        torch.manual_seed(3)
        return [p.detach() for p in SharedTrunks(DoranConfig(rank=8)).build(spec()).parameters()]

    expected = start()
    torch.set_default_dtype(torch.float64)
    try:
        assert all(torch.equal(a, b) for a, b in zip(expected, start(), strict=True))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert all(p.is_meta for p in start())


def test_the_choice_of_a_start_is_not_saved_and_an_adapter_of_the_old_one_loads(tmp_path):
    config = DoranConfig(
        rank=4, target_modules="all-linear", sharing="model", generator_init="normal", embedding_dim=64
    )
    model = blocks()
    handle = adapt(model, config)
    x = torch.randn(3, 24)
    for parameter in handle.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    handle.save(tmp_path / "old")
    assert "generator_init" not in (tmp_path / "old" / "adapter_config.json").read_text()
    again = blocks()
    loaded = load(again, tmp_path / "old")
    assert torch.equal(again(x), model(x))
    assert loaded.config.embedding_dim == 64


def test_a_layer_starts_as_its_base():
    base, x = nn.Linear(64, 48), torch.randn(3, 64)
    for activation in [*UNBOUNDED, "tanh"]:
        layer = DoranLinear(base, DoranConfig(rank=8, activation=activation))
        assert torch.equal(layer(x), base(x))


def test_a_layer_after_one_that_has_moved_starts_the_same():
    def start(dtype):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 12))
        for parameter in model.to(dtype).parameters():  # a float64 base takes its adapter along, as another device does
            nn.init.constant_(parameter, 0.1)
        adapt(model, DoranConfig(rank=4, target_modules="all-linear"))
        return {name: p.detach() for name, p in model.named_parameters() if ".factors." in name}

    narrow, wide = start(torch.float32), start(torch.float64)
    assert len(narrow) == 8
    assert all(torch.equal(value.double(), wide[name]) for name, value in narrow.items())
