"""Static and generated factors: the paper's formula, who shares what, starts, and a generator of one's own."""

import oracle
import pytest
import torch
from torch import nn

from doran_core.layers import DoranLinear
from doran_core.method.config import DoranConfig
from doran_core.method.factors import LayerSpec, StaticFactors
from doran_core.method.sharing import SharedTrunks, block_of


def spec(name, d_in=24, d_out=12, rank=4):
    return LayerSpec(name, block_of(name), d_in, d_out, rank, 2.0)


Q0, V0 = spec("layers.0.q_proj"), spec("layers.0.v_proj", d_out=6)
Q1, V1 = spec("layers.1.q_proj"), spec("layers.1.v_proj", d_out=6)


@pytest.mark.parametrize(
    ("name", "pattern", "block"),
    [
        ("model.layers.3.self_attn.q_proj", None, "model.layers.3"),
        ("encoder.layer.11.attention.self.query", None, "encoder.layer.11"),
        ("encoder.block.2.layer.0.SelfAttention.q", None, "encoder.block.2.layer.0"),
        ("net.0", None, ""),
        ("0.linear", None, "0"),
        ("classifier", None, ""),
        ("h2o.q_proj", None, ""),
        ("encoder.block.2.layer.0.SelfAttention.q", r"(encoder\.block\.\d+)\.", "encoder.block.2"),
        ("stage1.q", r"stage\d", "stage1"),
    ],
)
def test_block_of_a_name(name, pattern, block):
    assert block_of(name, pattern) == block


def test_generated_factors_are_the_papers_formula():
    factors = SharedTrunks(DoranConfig(rank=4, embedding_dim=5, hidden_dim=7)).build(Q0)
    nn.init.normal_(factors.w2_B)
    A, B = factors()
    trunk = factors.trunk
    expected_A = oracle.generated(trunk.A.embedding, trunk.A.weights[0], factors.w2_A)
    expected_B = oracle.generated(trunk.B.embedding, trunk.B.weights[0], factors.w2_B).T
    assert A.shape == (4, 24)
    assert B.shape == (12, 4)
    assert torch.allclose(A.double(), expected_A, atol=1e-6)
    assert torch.allclose(B.double(), expected_B, atol=1e-6)


@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "gelu", "silu", "tanh", "identity"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_network_starts_with_the_spread_of_loras_factor_and_a_zero(activation, depth):
    wide = LayerSpec("layers.0.q_proj", "layers.0", 4096, 64, 16, 2.0)
    generated, B = SharedTrunks(DoranConfig(rank=16, activation=activation, depth=depth)).build(wide)()
    static, _ = StaticFactors(wide)()
    assert generated.std().item() == pytest.approx(static.std().item(), rel=0.05)
    assert torch.equal(B, torch.zeros(64, 16))


@pytest.mark.parametrize(
    ("sharing", "same"),
    [("block", {(0, 1), (2, 3)}), ("model", {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}), ("none", set())],
)
def test_who_shares_a_trunk(sharing, same):
    trunks = SharedTrunks(DoranConfig(rank=4, sharing=sharing))
    layers = [trunks.build(s) for s in (Q0, V0, Q1, V1)]
    pairs = {(i, j) for i in range(4) for j in range(i + 1, 4) if layers[i].trunk is layers[j].trunk}
    assert pairs == same


def test_a_shared_trunk_is_registered_once_and_gets_gradients_from_all():
    trunks = SharedTrunks(DoranConfig(rank=4))
    model = nn.ModuleList([trunks.build(Q0), trunks.build(V0)])
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) == 8
    assert not any("trunk" in name for name in names if name.startswith("1."))
    model[1]()[0].sum().backward()
    assert model[0].trunk.A.embedding.grad.abs().sum() > 0


def test_model_wide_sharing_tells_blocks_apart_by_their_embedding():
    trunks = SharedTrunks(DoranConfig(rank=4, sharing="model", share_output=True))
    q0, v0, q1 = trunks.build(Q0), trunks.build(V0), trunks.build(Q1)
    nn.init.normal_(q0.block_embedding.vector)
    assert torch.equal(q0()[0], v0()[0])
    assert not torch.allclose(q0()[0], q1()[0])
    assert v0.block_embedding is q0.block_embedding is not q1.block_embedding
    names = set(nn.ModuleList([q0, v0, q1]).state_dict())
    assert {name for name in names if not name.startswith("0.")} == {"2.block_embedding.vector"}
    assert set(q0.trunk.output_B) == {"12", "6"}


def test_another_rank_is_another_group():
    trunks = SharedTrunks(DoranConfig(rank=4))
    a, b = trunks.build(Q0), trunks.build(spec("layers.0.v_proj", rank=2))
    assert a.trunk is not b.trunk
    assert b()[0].shape == (2, 24)


def test_a_generator_of_ones_own_needs_no_change_to_the_package():
    class Fourier(nn.Module):
        def __init__(self, spec):
            super().__init__()
            grid = torch.arange(spec.rank)[:, None] * torch.linspace(0, 3.14, spec.d_in)
            self.register_buffer("A", torch.cos(grid) / spec.d_in**0.5)
            self.B = nn.Parameter(torch.zeros(spec.d_out, spec.rank))

        def forward(self):
            return self.A, self.B

    base, x = nn.Linear(24, 12), torch.randn(3, 24)
    layer = DoranLinear(base, DoranConfig(rank=4), factor_builder=Fourier)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert layer.doran_adapter.factors.B.grad.abs().sum() > 0
