"""The gradient split against autograd on V itself."""

import pytest
import torch
from torch import nn

from doran_core import DoranConfig, adapt
from doran_core.diagnostics import GradientProbe, gradient_split
from doran_core.errors import DoranError, TargetError


def test_split_is_what_autograd_passes_to_the_direction():
    V = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    G = torch.randn(5, 9, dtype=torch.float64)
    tau = torch.rand(5, dtype=torch.float64)
    n = V.norm(dim=1)
    scale = (n + tau).detach() / (n + tau)  # c = 1, with the gradient of c
    ((scale[:, None] * V) * G).sum().backward()
    unit = V.detach() / n.detach()[:, None]
    along = (V.grad * unit).sum(1)
    split = gradient_split(G, V, tau)
    assert split.kept_parallel == pytest.approx(along.norm().item(), rel=1e-10)
    assert split.orthogonal == pytest.approx((V.grad - along[:, None] * unit).norm().item(), rel=1e-10)
    assert split.parallel == pytest.approx((G * unit).sum(1).norm().item(), rel=1e-10)
    assert split.parallel_weight == pytest.approx((tau / (n + tau)).mean().item(), rel=1e-10)


@pytest.mark.parametrize(("kind", "kept"), [("zero", False), ("learned", True)])
def test_probe_on_a_model_sees_what_tau_keeps(kind, kept):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    adapt(model, DoranConfig(rank=2, target_modules="all-linear", tau_kind=kind))
    x = torch.randn(10, 6)
    reference = [layer.base_layer.weight.detach().clone().requires_grad_() for layer in (model[0], model[2])]
    hidden = torch.tanh(x @ reference[0].T + model[0].base_layer.bias)
    (hidden @ reference[1].T + model[2].base_layer.bias).square().sum().backward()
    with GradientProbe(model) as probe:
        model(x).square().sum().backward()
    splits = probe.splits()
    assert list(splits) == ["2", "0"] or list(splits) == ["0", "2"]
    for name, weight in zip(("0", "2"), reference, strict=True):
        split = splits[name]
        total = (split.orthogonal**2 + split.parallel**2) ** 0.5
        assert total == pytest.approx(weight.grad.norm().item(), rel=1e-4)
        assert (split.kept_parallel > 0) is kept


def test_probe_says_what_is_missing():
    with pytest.raises(TargetError, match="this Linear has no linear layer adapted"):
        GradientProbe(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2))
    adapt(model, DoranConfig(rank=1, target_modules="all-linear"))
    with pytest.raises(DoranError, match="saw no backward pass"):
        GradientProbe(model).splits()
