"""Spectra, effective ranks and similarities against the matrices that the code never forms."""

import pytest
import torch

from doran_core.diagnostics import delta_similarity, effective_rank, singular_values


@pytest.mark.parametrize(("rank", "d_out", "d_in"), [(4, 30, 20), (4, 3, 20), (8, 20, 5), (1, 6, 6)])
def test_singular_values(rank, d_out, d_in):
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    expected = torch.linalg.svdvals(-2.0 * B.double() @ A.double())[: min(rank, d_out, d_in)]
    torch.testing.assert_close(singular_values(A, B, -2.0), expected, rtol=1e-10, atol=1e-10)


def test_effective_rank():
    assert effective_rank(torch.ones(5, dtype=torch.float64)) == pytest.approx(5.0)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(3)) == 0.0
    assert 1.0 < effective_rank(torch.tensor([3.0, 1.0, 0.1])) < 3.0


def test_similarity():
    pairs = [(torch.randn(rank, 10), torch.randn(7, rank)) for rank in (2, 3, 4)]
    pairs += [(pairs[0][0] * 2, pairs[0][1]), (pairs[0][0], -pairs[0][1]), (pairs[0][0], pairs[0][1] * 0)]
    flat = [(B.double() @ A.double()).flatten() for A, B in pairs[:5]]
    expected = torch.stack([torch.stack([a @ b / a.norm() / b.norm() for b in flat]) for a in flat])
    found = delta_similarity(pairs)
    torch.testing.assert_close(found[:5, :5], expected, rtol=1e-10, atol=1e-12)
    assert found[0, 3] == pytest.approx(1.0)
    assert found[0, 4] == pytest.approx(-1.0)
    assert torch.equal(found[5], torch.zeros(6, dtype=torch.float64))
