"""Adapted layers: the start, the function, merging and back, precision, masks, compile, and every kind of base."""

import copy

import oracle
import pytest
import torch
from torch import nn

from doran_core.errors import ConfigError, TargetError
from doran_core.layers import DoranConv, DoranConv2d, DoranEmbedding, DoranLinear, wrap
from doran_core.method.config import DoranConfig

OPTIONS = [
    {},
    {"factors": "static"},
    {"tau_kind": "zero"},
    {"tau_kind": "fixed"},
    {"tau_kind": "gaussian"},
    {"tau_kind": "gaussian", "tau_learn_sigma": True},
    {"tau_granularity": "row"},
    {"tau_granularity": "head", "head_dim": 4},
    {"tau_init_relative": False, "tau_init": 3.0},
    {"norm_grad": "detached"},
    {"norm_method": "direct"},
    {"norm_method": "factored"},
    {"use_rslora": True},
    {"sharing": "model"},
    {"sharing": "none"},
    {"sharing": "model", "share_output": True},
    {"depth": 1},
    {"depth": 3, "activation": "tanh"},
    {"experts": True, "expert_mask": "element", "expert_dropout": 0.5},
    {"experts": True, "expert_mask": "expert", "expert_dropout": 0.5},
    {"dropout": 0.3},
]


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight [d_in, d_out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class PackedLinear(nn.Module):
    """A linear layer in 8 bits per weight, with a scale per row, that gives no dense weight."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        scale = dense.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (dense.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = dense.bias

    def dense(self):
        return self.packed * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dense(), self.bias)


def bases():
    return [
        (nn.Linear(24, 12), torch.randn(3, 5, 24)),
        (nn.Linear(24, 12, bias=False), torch.randn(3, 24)),
        (Conv1D(12, 24), torch.randn(2, 3, 24)),
        (nn.Embedding(30, 12, padding_idx=0), torch.randint(0, 30, (4, 5))),
        (nn.Conv2d(4, 12, 3, padding=1, stride=2, dilation=2), torch.randn(2, 4, 9, 9)),
        (nn.Conv2d(4, 12, (2, 3), padding=1, padding_mode="circular"), torch.randn(2, 4, 6, 6)),
    ]


def shake(layer, amount=0.2):
    """Move every adapter parameter, so that nothing is at its start."""
    with torch.no_grad():
        for parameter in layer.doran_adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * amount)
    return layer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_step_zero_is_the_base_layer_to_the_bit(options, dtype):
    for base, x in bases():
        base = base.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        expected = base(x)
        layer = wrap(base, DoranConfig(rank=4, **options)).eval()
        assert torch.equal(layer(x), expected), base
        if "gaussian" not in options.values():
            assert torch.equal(layer.train()(x), expected), base


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trained_layer_is_the_oracles_and_merges_and_unmerges(options):
    for base, x in bases():
        layer = shake(wrap(base, DoranConfig(rank=4, alpha=3.0, **options))).eval()
        adapter, view = layer.doran_adapter, layer.view
        A, B = adapter.factor_pair()
        before = base.weight.detach().clone()
        matrix = oracle.merged(
            view.weight().detach(),
            A.detach(),
            B.detach(),
            adapter.scaling,
            adapter.magnitude.detach(),
            adapter.tau.value().detach(),
        )
        reference = copy.deepcopy(base).double()
        with torch.no_grad():
            reference.weight.copy_(type(view)(reference).stored(matrix))
        expected = reference(x.double() if x.is_floating_point() else x)
        adapted = layer(x)
        assert adapted.dtype == torch.float32
        assert torch.allclose(adapted.double(), expected, atol=2e-5 * expected.abs().max().item())
        layer.merge(check_finite=True)
        assert torch.allclose(layer(x).double(), expected, atol=2e-5 * expected.abs().max().item())
        assert not torch.equal(base.weight, before)
        layer.unmerge()
        assert torch.equal(base.weight, before)
        assert torch.equal(layer(x), adapted)


def test_gradients_of_generator_tau_and_magnitude_against_a_naive_graph():
    base = nn.Linear(10, 6).double()
    layer = shake(DoranLinear(base, DoranConfig(rank=3, embedding_dim=4, hidden_dim=5))).double()
    adapter = layer.doran_adapter
    x = torch.randn(7, 10, dtype=torch.float64)
    layer(x).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    adapter.zero_grad()
    trunk, factors = adapter.factors.trunk, adapter.factors
    A = oracle.generated(trunk.A.embedding, trunk.A.weights[0], factors.w2_A)
    B = oracle.generated(trunk.B.embedding, trunk.B.weights[0], factors.w2_B).T
    V = base.weight + adapter.scaling * B @ A
    scale = adapter.magnitude / (V.norm(dim=1) + torch.log1p(torch.exp(adapter.tau.raw)))
    (x @ (scale[:, None] * V).T + base.bias).square().sum().backward()
    assert set(ours) == {name for name, _ in adapter.named_parameters()}
    for name, parameter in adapter.named_parameters():
        assert torch.allclose(ours[name], parameter.grad, rtol=1e-9, atol=1e-12), name
        assert ours[name].abs().max() > 0, name


def test_packed_base_gives_the_function_of_its_dense_copy():
    packed = PackedLinear(nn.Linear(300, 12))
    dense = nn.Linear(300, 12)
    with torch.no_grad():
        dense.weight.copy_(packed.dense())
        dense.bias.copy_(packed.bias)
    torch.manual_seed(1)
    on_packed = DoranLinear(packed, DoranConfig(rank=4))
    torch.manual_seed(1)
    on_dense = DoranLinear(dense, DoranConfig(rank=4))
    x = torch.randn(5, 300)
    assert torch.equal(on_packed(x), packed(x))
    for layer in (on_packed, on_dense):
        torch.manual_seed(2)
        shake(layer)
        layer(x).square().sum().backward()
    assert torch.allclose(on_packed(x), on_dense(x), atol=1e-5)
    for (name, p), q in zip(
        on_packed.doran_adapter.named_parameters(), on_dense.doran_adapter.parameters(), strict=True
    ):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4), name
    with pytest.raises(TargetError, match="PackedLinear gives no access to its weight"):
        on_packed.merge()


def test_rows_that_cancel_use_the_direct_norm():
    base = nn.Linear(16, 4, bias=False)
    layer = DoranLinear(base, DoranConfig(rank=4, alpha=4, factors="static", norm_method="auto"))
    with torch.no_grad():
        layer.doran_adapter.factors.A.copy_(base.weight)
        layer.doran_adapter.factors.B.copy_(-torch.eye(4) * (1 - 1e-4))
    A, B = layer.doran_adapter.factor_pair()
    norm = layer.doran_adapter.norm(layer.view, A, B)
    exact = oracle.norm(base.weight, A, B, 1.0)
    assert ((norm - exact).abs() / exact).max() < 5e-3
    norm.sum().backward()
    assert layer.doran_adapter.factors.A.grad.isfinite().all()


@pytest.mark.parametrize("mask", ["element", "expert"])
def test_masks_drop_in_training_only_and_average_to_one(mask):
    layer = shake(
        DoranLinear(
            nn.Linear(40, 12),
            DoranConfig(rank=8, factors="static", experts=True, expert_mask=mask, expert_dropout=0.25),
        )
    )
    clean = layer.eval().doran_adapter.factor_pair()[0]
    layer.train()
    draws = torch.stack([layer.doran_adapter.factor_pair()[0] for _ in range(3000)])
    dropped = draws == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (dropped.all(2) == dropped.any(2)).all() == (mask == "expert")
    assert torch.allclose(draws.mean(0), clean, atol=0.06 * clean.abs().max().item())
    merged = layer.doran_adapter.merged_weight(layer.base_layer.weight)
    assert torch.equal(merged, layer.eval().doran_adapter.merged_weight(layer.base_layer.weight))


def test_casting_the_model_leaves_the_adapter_in_float32():
    layer = wrap(nn.Linear(24, 12), DoranConfig(rank=4))
    layer.to(torch.bfloat16)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in layer.doran_adapter.parameters()} == {torch.float32}
    assert layer(torch.randn(2, 24).bfloat16()).dtype == torch.bfloat16


def test_autocast_and_half_inputs():
    layer = shake(wrap(nn.Linear(24, 12), DoranConfig(rank=4)))
    x = torch.randn(3, 24)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x)
    assert rough.dtype == torch.bfloat16
    assert torch.allclose(rough.float(), exact, atol=0.1, rtol=0.05)


def test_compile_has_no_graph_break_and_the_same_gradients():
    layer = shake(wrap(nn.Linear(24, 12), DoranConfig(rank=4)))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 24)
    layer(x).square().sum().backward()
    eager = [p.grad.clone() for p in layer.doran_adapter.parameters()]
    layer.zero_grad()
    result = compiled(x)
    result.square().sum().backward()
    assert torch.allclose(result, layer(x), atol=1e-5)
    for p, expected in zip(layer.doran_adapter.parameters(), eager, strict=True):
        assert torch.allclose(p.grad, expected, atol=1e-4, rtol=1e-4)


def test_base_stays_frozen_and_deepcopy_keeps_sharing():
    layer = wrap(nn.Linear(24, 12), DoranConfig(rank=4))
    assert not any(p.requires_grad for p in layer.base_layer.parameters())
    twin = copy.deepcopy(layer)
    assert twin.doran_adapter.factors.trunk is not layer.doran_adapter.factors.trunk


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(torch.nn.functional.pad(x, (1, 1, 1, 1)))


def test_kinds_of_wrappers_and_what_cannot_be_adapted():
    assert isinstance(wrap(nn.Embedding(5, 4), DoranConfig()), DoranEmbedding)
    assert isinstance(wrap(nn.Conv2d(2, 4, 1), DoranConfig()), DoranConv2d)
    with pytest.raises(TargetError, match=r"norm1: DoRAN adapts .* got LayerNorm"):
        wrap(nn.LayerNorm(4), DoranConfig(), name="norm1")
    assert isinstance(wrap(nn.Conv1d(4, 4, 1, groups=2), DoranConfig()), DoranConv)
    assert isinstance(wrap(nn.Conv3d(2, 4, 1), DoranConfig()), DoranConv)
    with pytest.raises(TargetError, match=r"Padded with a forward of its own"):
        wrap(Padded(2, 4, 1), DoranConfig())
    with pytest.raises(TargetError, match=r"LazyConv2d has no weight yet"):
        wrap(nn.LazyConv2d(4, 1), DoranConfig())
    with pytest.raises(TargetError, match="max_norm"):
        wrap(nn.Embedding(5, 4, max_norm=1.0), DoranConfig())
    with pytest.raises(ConfigError, match="head_dim"):
        wrap(nn.Linear(4, 6), DoranConfig(tau_granularity="head", head_dim=4))
