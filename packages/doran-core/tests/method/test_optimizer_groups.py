"""Weight decay reaches matrices alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import doran_core
from doran_core.errors import ConfigError


def adapted(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    return doran_core.adapt(model, doran_core.DoranConfig(rank=2, target_modules=["0", "1"], **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factors": "static", "experts": True},
        {"sharing": "model", "share_output": True},
        {"modules_to_save": ["2"]},
    ],
)
def test_every_parameter_is_in_one_group_and_matrices_alone_decay(options) -> None:
    handle = adapted(**options)
    decayed, others = handle.parameter_groups(weight_decay=0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    found = [id(p) for group in (decayed, others) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in handle.parameters())
    names = {id(p): name for name, p in handle.named_parameters()}
    kept = {names[id(p)].rpartition(".")[2] for p in others["params"]}
    assert kept <= {"magnitude", "raw", "coefficients", "vector", "bias"}
    assert {"magnitude", "raw"} <= kept
    assert not {names[id(p)].rpartition(".")[2] for p in decayed["params"]} & kept


def test_decay_alone_leaves_magnitude_and_tau_where_they_are() -> None:
    handle = adapted()
    before = {name: p.detach().clone() for name, p in handle.named_parameters()}
    optimizer = torch.optim.AdamW(handle.parameter_groups(weight_decay=0.5), lr=0.1)
    for parameter in handle.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name.rpartition(".")[2] for name, p in handle.named_parameters() if not torch.equal(p, before[name])}
    assert "w2_A" in moved
    assert not moved & {"magnitude", "raw"}


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_decay_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="weight_decay"):
        adapted().parameter_groups(weight_decay=value)
