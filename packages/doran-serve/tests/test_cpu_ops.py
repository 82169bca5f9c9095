"""The CPU operators against a loop over tokens, and nothing for tokens without an adapter."""

from __future__ import annotations

import pytest
import torch

from doran_serve import cpu_ops

SLOTS = torch.tensor([2, -1, 0, 0, -1, 2])


def product(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    rows = [x[t] @ weights[s].T if s >= 0 else torch.zeros(weights.shape[1]) for t, s in enumerate(SLOTS.tolist())]
    return torch.stack(rows)


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(6, 9, generator=draw), torch.randn(3, 7, 9, generator=draw)


@pytest.mark.parametrize("stacked", [True, False])
def test_shrink(data: tuple[torch.Tensor, torch.Tensor], stacked: bool) -> None:
    x, weights = data
    out = torch.full((6, 8), 5.0)
    cpu_ops.bgmv_shrink(x, weights.unsqueeze(1) if stacked else weights, out, SLOTS, 2.0)
    torch.testing.assert_close(out[:, :7], 2 * product(x, weights))
    assert torch.equal(out[:, 7], torch.full((6,), 5.0))


@pytest.mark.parametrize("add", [True, False])
def test_expand_slice(data: tuple[torch.Tensor, torch.Tensor], add: bool) -> None:
    x, weights = data
    out = torch.full((6, 12), 5.0)
    cpu_ops.bgmv_expand_slice(x, weights, out, SLOTS, 3, 7, add)
    torch.testing.assert_close(out[:, 3:10], product(x, weights) + (5.0 if add else 0.0))
    assert torch.equal(out[:, :3], torch.full((6, 3), 5.0))


def test_expand_leaves_tokens_without_an_adapter_alone(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weights = data
    out = torch.randn(6, 7)
    before = out.clone()
    cpu_ops.bgmv_expand(x, weights, out, SLOTS)
    torch.testing.assert_close(out, before + product(x, weights))
    assert torch.equal(out[SLOTS == -1], before[SLOTS == -1])
