"""The formulas against the float64 oracle: values, gradients, dtypes, and the cases that break naive code."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doran_core import functional

SIZES = st.tuples(st.integers(1, 17), st.integers(1, 23), st.integers(1, 6))
SEEDS = st.integers(0, 2**31)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def draw(sizes, seed, dtype=torch.float64, tau=0.3):
    d_out, d_in, rank = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "weight": normal(d_out, d_in),
        "A": normal(rank, d_in) * 0.5,
        "B": normal(d_out, rank) * 0.5,
        "magnitude": normal(d_out).abs() + 0.1,
        "bias": normal(d_out),
        "x": normal(3, d_in),
        "tau": torch.full((1,), tau, dtype=dtype),
        "scaling": 1.7,
    }


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.sampled_from(list(TOLERANCE)))
def test_norm_scale_and_output_match_the_oracle_in_every_dtype(sizes, seed, dtype):
    case = draw(sizes, seed, dtype)
    weight, A, B, g = case["weight"], case["A"], case["B"], case["scaling"]
    expected = oracle.norm(weight, A, B, g)
    direct = functional.row_norm(weight, A, B, g)
    assert direct.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(direct, expected) < 1e-6
    y = functional.adapted_linear(case["x"], weight, A, B, g, case["magnitude"], case["tau"], case["bias"])
    assert y.dtype == dtype
    wide = oracle.linear(case["x"], weight, A, B, g, case["magnitude"], case["tau"].double(), case["bias"])
    scale = wide.abs().max() + (case["x"].double().abs() @ weight.double().abs().T).max()
    assert (y.double() - wide).abs().max() <= TOLERANCE[dtype] * scale


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS)
def test_factored_norm_equals_direct_norm_in_float64(sizes, seed):
    case = draw(sizes, seed)
    weight, A, B, g = case["weight"], case["A"], case["B"], case["scaling"]
    factored = functional.factored_row_norm(
        functional.base_squared_norm(weight), functional.base_product(weight, A), A, B, g
    )
    direct = oracle.norm(weight, A, B, g)
    residual = direct / oracle.norm(weight, A, B * 0, g)
    assert ((factored - direct).abs() <= 1e-12 * direct / residual.clamp(max=1).square()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factored_norm_at_realistic_scales_is_right_to_1e5(dtype):
    weight = (torch.randn(768, 2048) * 0.02).to(dtype)
    A, B = torch.randn(16, 2048) / 2048**0.5, torch.randn(768, 16) * 0.02
    factored = functional.factored_row_norm(
        functional.base_squared_norm(weight), functional.base_product(weight, A), A, B, 2.0
    )
    exact = oracle.norm(weight, A, B, 2.0)
    assert ((factored.double() - exact).abs() / exact).max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.floats(0.0, 10.0))
def test_gradient_formula_of_the_full_norm_against_autograd(sizes, seed, tau):
    """dL/dV keeps tau / (n + tau) of the parallel part; A and B get it through V's product rule."""
    case = draw(sizes, seed)
    weight, g, magnitude = case["weight"], case["scaling"], case["magnitude"]
    A, B = case["A"].requires_grad_(), case["B"].requires_grad_()
    norm = functional.factored_row_norm(
        functional.base_squared_norm(weight), functional.base_product(weight, A), A, B, g
    )
    scale = functional.output_scale(magnitude, norm, tau)
    grad = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    adapted = scale[:, None] * (weight + g * B @ A)
    adapted.backward(grad)
    dV = oracle.direction_gradient(grad, weight, A.detach(), B.detach(), g, magnitude, tau)
    conditioning = (weight.norm() / oracle.norm(weight, A.detach(), B.detach(), g).min()).clamp_min(1).square()
    bound = 1e-10 * conditioning * (1 + dV.abs().max()) * (1 + A.abs().max() + B.abs().max()) * 100
    assert (A.grad - g * B.detach().T @ dV).abs().max() < bound
    assert (B.grad - g * dV @ A.detach().T).abs().max() < bound


@settings(max_examples=40, deadline=None)
@given(SIZES, SEEDS)
def test_every_gradient_of_the_layer_against_the_naive_graph(sizes, seed):
    names = ("x", "A", "B", "magnitude", "tau")
    ours, naive = draw(sizes, seed), draw(sizes, seed)
    for case in (ours, naive):
        for name in names:
            case[name].requires_grad_()
    y = functional.adapted_linear(*(ours[k] for k in ("x", "weight", "A", "B", "scaling", "magnitude", "tau", "bias")))
    V = naive["weight"] + naive["scaling"] * naive["B"] @ naive["A"]
    scale = naive["magnitude"] / (V.norm(dim=1) + naive["tau"])
    reference = naive["x"] @ (scale[:, None] * V).T + naive["bias"]
    cotangent = torch.randn(y.shape, dtype=torch.float64)
    y.backward(cotangent)
    reference.backward(cotangent)
    residual = (V.norm(dim=1) / naive["weight"].norm(dim=1)).min().clamp(max=1).item()
    for name in names:
        assert relative(ours[name].grad, naive[name].grad) < 1e-10 / residual**2, name


def test_detached_norm_blocks_exactly_the_norm_path():
    case = draw((5, 7, 2), 3)
    A = case["A"].requires_grad_()
    y = functional.adapted_linear(
        case["x"], case["weight"], A, case["B"], 1.7, case["magnitude"], 0.0, detach_norm=True
    )
    y.sum().backward()
    n = oracle.norm(case["weight"], A.detach(), case["B"], 1.7)
    c = case["magnitude"] / n
    G = torch.ones(3, 5, dtype=torch.float64).T @ case["x"]
    assert torch.allclose(A.grad, 1.7 * case["B"].T @ (c[:, None] * G), rtol=1e-12)


def test_a_row_of_zeros_gives_zero_and_finite_gradients():
    weight = torch.zeros(2, 3)
    weight[1] = 1.0
    A, B = torch.randn(2, 3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    magnitude, tau = torch.ones(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    y = functional.adapted_linear(torch.randn(4, 3), weight, A, B, 1.0, magnitude, tau)
    y.sum().backward()
    assert torch.equal(y[:, 0], torch.zeros(4))
    for tensor in (A, B, magnitude, tau):
        assert tensor.grad.isfinite().all()


def test_tau_bounds_what_a_vanishing_norm_does():
    """V near zero: with tau = 0 the gradient of A grows as 1 / ||V||; with tau it stays below |m| / tau."""
    weight = torch.randn(4, 8, dtype=torch.float64)
    G = torch.randn(4, 8, dtype=torch.float64)
    for residual in (1e-3, 1e-6, 1e-9):
        B = torch.zeros(4, 1, dtype=torch.float64)
        B[0, 0] = -(1.0 - residual)
        lengths = {}
        for tau in (0.0, 0.5):
            A = weight[:1].clone().requires_grad_()
            norm, ones = functional.row_norm(weight, A, B, 1.0), torch.ones(4, dtype=torch.float64)
            scale = functional.output_scale(ones, norm, tau)
            ((scale[:, None] * (weight + B @ A)) * G).sum().backward()
            lengths[tau] = (A.grad.norm() / G[0].norm()).item()
        largest = 1.0 / (residual * weight[0].norm().item())
        assert 0.1 * largest < lengths[0.0] < 1.01 * largest
        assert lengths[0.5] <= 1.0 / 0.5


def test_worst_case_of_the_factored_norm_and_how_tau_bounds_it():
    """V = residual * W0 in float32: the factored norm loses eps / residual^2, the direct one eps / residual.

    c = m / (n + tau) goes as wrong as n where tau = 0; with tau its relative error is that of n times n / (n + tau).
    """
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    eps, tau = torch.finfo(torch.float32).eps, 0.1 * weight.norm(dim=1).mean()
    for residual in (1e-1, 1e-2, 1e-3, 1e-4):
        # B A = (residual - 1) W0 with the rows of W0 in the span of A
        B = (residual - 1.0) * torch.eye(64)
        exact = oracle.norm(weight, weight, B, 1.0)
        factored = functional.factored_row_norm(
            functional.base_squared_norm(weight), functional.base_product(weight, weight), weight, B, 1.0
        )
        error = (factored.double() - exact).abs() / exact
        assert error.max() < 30 * eps / residual**2
        assert (
            (functional.row_norm(weight, weight, B, 1.0).double() - exact).abs() / exact
        ).max() < 30 * eps / residual
        one = torch.ones(64)
        wrong = functional.output_scale(one, factored, tau).double() / functional.output_scale(one, exact, tau) - 1.0
        assert (wrong.abs() <= error * exact / (factored + tau) + 1e-6).all()
        assert wrong.abs().max() < 0.01
    assert error.max() > 0.1  # at a residual of 1e-4, without tau, the factored norm is worthless


def test_large_tau_is_a_scaled_sum_that_keeps_the_parallel_gradient():
    case = draw((6, 9, 3), 11)
    weight, A, B, g = case["weight"], case["A"], case["B"].requires_grad_(), case["scaling"]
    tau, c = 1e8, 0.7
    V = weight + g * B @ A
    norm = functional.row_norm(weight, A, B, g)
    scale = functional.output_scale(torch.full((6,), c * tau, dtype=torch.float64), norm, tau)
    adapted = scale[:, None] * V
    assert relative(adapted.detach(), (c * V).detach()) < 1e-6
    G = V.detach().clone()
    adapted.backward(G)
    assert relative(B.grad, g * c * G @ A.T) < 1e-6


def test_merged_weight_is_the_oracles_and_rows_are_independent():
    case = draw((9, 13, 4), 5, torch.float32)
    args = (case["A"], case["B"], case["scaling"], case["magnitude"], case["tau"])
    whole = functional.merged_weight(case["weight"], *args)
    expected = oracle.merged(case["weight"], case["A"], case["B"], 1.7, case["magnitude"], case["tau"])
    assert whole.dtype == torch.float64
    assert relative(whole, expected) < 1e-14
    part = functional.merged_weight(
        case["weight"][2:5], case["A"], case["B"][2:5], 1.7, case["magnitude"][2:5], case["tau"]
    )
    assert relative(part, expected[2:5]) < 1e-14


def test_identity_scale_returns_the_base_output_to_the_bit():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        z, bias = torch.randn(5, 8).to(dtype), torch.randn(8).to(dtype)
        y = functional.adapted_output(z, torch.zeros(5, 8, dtype=dtype), torch.ones(8), bias)
        assert torch.equal(y, z)


def test_base_product_of_a_half_weight_keeps_float32_and_no_weight_gradient():
    weight = torch.randn(300, 64).bfloat16()
    A = torch.randn(4, 64, requires_grad=True)
    product = functional.base_product(weight, A)
    product.backward(torch.ones_like(product))
    assert product.dtype == torch.float32
    assert relative(product.detach(), weight.double() @ A.detach().double().T) < 1e-6
    assert relative(A.grad, torch.ones(4, 300).double() @ weight.double()) < 1e-6
