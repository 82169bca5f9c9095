"""The simulation: its two families hold the same truth, and its fits are least squares."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from experiments import theory
from experiments.theory import Setting, fit

SETTING = Setting(
    dimension=4, hidden=2, true_experts=3, fitted_experts=3, family="shared", samples=400, noise=0.0, seed=0
)


@pytest.mark.parametrize("family", ["shared", "separate"])
def test_without_noise_the_truth_is_found(family: theory.Family) -> None:
    found = fit(dataclasses.replace(SETTING, family=family))
    assert found.function_error < 1e-4
    assert found.factor_error < 1e-2


def test_noise_makes_errors_and_data_makes_them_small() -> None:
    few, many = (fit(dataclasses.replace(SETTING, noise=0.3, samples=n)).function_error for n in (100, 1600))
    assert many < few / 2
    # A least squares fit of p parameters to n outputs of d numbers errs by about noise * sqrt(p / n).
    assert many == pytest.approx(0.3 * (47 / 1600) ** 0.5, rel=0.7)


def test_the_mixture_is_the_sum_over_experts_with_the_pretrained_one_in_front() -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 3, dtype=torch.float64)
    query, value, M_Q, M_V = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 3), (2, 3, 3), (3, 3), (3, 3))
    )
    bias = torch.tensor([0.3, -0.4], dtype=torch.float64)
    result = theory.mixture(x, (query, value, bias), (M_Q, M_V))
    for row, of_row in zip(x, result, strict=True):
        gates = [torch.exp(row @ M_Q @ row / 3)]
        gates += [torch.exp(row @ (M_Q + query[j]) @ row / 3 + bias[j]) for j in range(2)]
        expected = gates[0] * (M_V @ row) + sum(gates[1 + j] * ((M_V + value[j]) @ row) for j in range(2))
        assert torch.allclose(of_row, expected / sum(gates))


def test_the_jacobian_is_that_of_automatic_differentiation() -> None:
    torch.manual_seed(2)
    x, M_Q, M_V = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 3), (3, 3), (3, 3)))
    experts = tuple(torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 3), (2, 3, 3), (2,)))
    by_part = torch.func.jacfwd(lambda *parts: theory.mixture(x, parts, (M_Q, M_V)).flatten(), argnums=(0, 1, 2))
    expected = torch.cat([part.flatten(1) for part in by_part(*experts)], dim=1)
    assert torch.allclose(theory.mixture_jacobian(x, experts, (M_Q, M_V)), expected, atol=1e-12)


def test_the_voronoi_loss_is_0_at_the_truth_also_with_an_expert_told_twice() -> None:
    torch.manual_seed(0)
    query, value = torch.randn(2, 3, 3), torch.randn(2, 3, 3)
    truth = query, value, torch.zeros(2)
    twice = [0, 0, 1]
    split_gate = torch.tensor([0.5, 0.5, 1.0]).log()
    assert theory._voronoi(truth, truth) == pytest.approx(0.0, abs=1e-6)
    assert theory._voronoi((query[twice], value[twice], split_gate), truth) == pytest.approx(0.0, abs=1e-6)
    moved = query.clone()
    moved[0, 0, 0] += 0.01
    assert theory._voronoi((moved, value, torch.zeros(2)), truth) == pytest.approx(0.01, rel=1e-3)
