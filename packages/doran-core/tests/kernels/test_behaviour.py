"""What surrounds a layer in real training: checkpointing, autocast, hooks, in-place activations, dropout, compile."""

import copy

import cases
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from doran_core import DoranConfig
from doran_core.errors import BackendError
from doran_core.kernels import get_backend, set_backend, use_backend
from doran_core.kernels.backend import choose
from doran_core.layers import DoranLinear, wrap

USUAL = cases.CASES["usual"]


def gradients(layer, x, call=None):
    """Output, and every gradient, of one pass."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = (layer if call is None else call)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.doran_adapter.parameters())]


def assert_same(ours, expected, tolerance=2e-5):
    assert len(ours) == len(expected)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert cases.error(mine, theirs.double().cpu()) <= tolerance


def test_step_zero_is_the_base_to_the_bit(implementation, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = nn.Linear(72, 123).to(device, dtype)
        x = torch.randn(37, 72).to(device, dtype)
        with use_backend(implementation):
            y = wrap(base, DoranConfig(rank=5))(x)
        if implementation == "triton" and cases.INTERPRETED:  # there, numpy's square root meets PyTorch's
            assert cases.error(y.detach(), base(x).detach().double()) < (1e-6 if dtype == torch.float32 else 1e-2)
        else:
            assert torch.equal(y, base(x)), dtype


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, implementation, device):
    layer, x = USUAL.layer(torch.float32, device), USUAL.x(torch.float32, device)
    with use_backend(implementation):
        expected = gradients(layer, x)
        ours = gradients(layer, x, lambda t: checkpoint(layer, t, use_reentrant=reentrant))
    assert_same(ours, expected, 1e-6)


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), lambda y: y.mul_(3.0), lambda y: y.view(-1).add_(1.0)])
@pytest.mark.parametrize("name", ["usual", "three dimensions"])
def test_an_activation_in_place_after_the_layer(name, activation, implementation, device):
    layer, x = cases.CASES[name].layer(torch.float32, device), cases.CASES[name].x(torch.float32, device)
    with use_backend("reference"):
        expected = gradients(layer, x, lambda t: activation(layer(t)))
    with use_backend(implementation):
        assert_same(gradients(layer, x, lambda t: activation(layer(t))), expected)


def test_dropout_draws_what_the_reference_draws(implementation, device):
    case = cases.Case(options={"dropout": 0.4})
    layer, x = case.layer(torch.float32, device), case.x(torch.float32, device)
    found = {}
    for name in ("reference", implementation):
        torch.manual_seed(3)
        with use_backend(name):
            found[name] = gradients(layer, x)
    assert_same(found[implementation], found["reference"])
    layer.eval()
    with use_backend(implementation):
        assert torch.equal(layer(x), layer(x))


def test_autocast_over_a_float32_model(implementation, device):
    layer, x = USUAL.layer(torch.float32, device), USUAL.x(torch.float32, device)
    found = {}
    for name in ("reference", implementation):
        with use_backend(name), torch.autocast(device, torch.bfloat16):
            found[name] = gradients(layer, x)
    assert found[implementation][0].dtype == torch.bfloat16
    assert_same(found[implementation], found["reference"], 2e-2 if not cases.INTERPRETED else 4e-2)


def test_hooks_of_the_base_layer_see_its_calls(implementation, device):
    layer, x = USUAL.layer(torch.float32, device), USUAL.x(torch.float32, device)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with use_backend("reference"):
        expected = gradients(layer, x)
    with use_backend(implementation):
        assert_same(gradients(layer, x), expected)
    assert seen == [(37, 123)] * 2


class HiddenLinear(nn.Module):
    """A linear layer that shows no weight."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.register_buffer("packed", dense.weight.detach()[None])
        self.bias = dense.bias

    def forward(self, x):
        return nn.functional.linear(x, self.packed[0], self.bias)


@pytest.mark.parametrize("norm_grad", ["full", "detached"])
def test_a_layer_that_hides_its_weight(norm_grad, implementation, device):
    dense = USUAL.layer(torch.float32, device)
    config = DoranConfig(rank=USUAL.rank, alpha=1.5 * USUAL.rank, norm_grad=norm_grad)
    dense.doran_adapter.config = config
    hidden = DoranLinear(HiddenLinear(dense.base_layer), config)
    hidden.doran_adapter.load_state_dict(dense.doran_adapter.state_dict())
    x = USUAL.x(torch.float32, device)
    with use_backend("reference"):
        expected = gradients(dense, x)
    with use_backend(implementation):
        assert_same(gradients(hidden, x), expected)


def test_rows_that_cancel_have_the_direct_norm_and_its_gradient(implementation, device):
    base = nn.Linear(96, 40, bias=False).to(device)
    layer = DoranLinear(base, DoranConfig(rank=40, alpha=40, factors="static"))
    factors = layer.doran_adapter.factors
    with torch.no_grad():
        factors.A.copy_(base.weight)
        nearly = torch.zeros(40)
        nearly[::3] = 1 - 1e-4
        factors.B.copy_(-torch.diag(nearly))
    x, grad = torch.randn(7, 96, device=device), torch.randn(7, 40, device=device)
    expected = cases.answer(layer, x, grad)
    with use_backend(implementation):
        y, found = cases.computed(layer, x, grad)
    assert cases.error(y, expected[0]) < 1e-3
    for name, exact in expected[1].items():
        assert cases.error(found[name], exact) < 2e-2, name  # eps / residual in float32 is 1e-3


def test_compiled_without_graph_breaks(implementation, device):
    layer, x = USUAL.layer(torch.float32, device), USUAL.x(torch.float32, device)
    torch._dynamo.reset()
    with use_backend(implementation):
        expected = gradients(layer, x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_same(gradients(layer, x, compiled), expected)
        assert_same(gradients(layer, x, lambda t: compiled(t).relu_()), gradients(layer, x, lambda t: layer(t).relu_()))


def test_no_tokens(implementation, device):
    layer = USUAL.layer(torch.float32, device)
    with use_backend(implementation):
        y = layer(torch.zeros(0, USUAL.d_in, device=device))
        y.sum().backward()
    assert y.shape == (0, USUAL.d_out)


def test_without_gradients_nothing_is_kept(implementation, device):
    layer, x = USUAL.layer(torch.float32, device), USUAL.x(torch.float32, device).detach()
    with use_backend(implementation):
        with torch.no_grad():
            y = layer(x)
        with torch.inference_mode():
            z = layer(x)
    assert y.grad_fn is None
    assert torch.equal(y, z)


def test_a_frozen_adapter_passes_gradients_on(implementation, device):
    layer, x = USUAL.layer(torch.float32, device), USUAL.x(torch.float32, device)
    layer.requires_grad_(False)
    grads = []
    for name in ("reference", implementation):
        with use_backend(name):
            y = layer(x)
            grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert_same(grads[1:], grads[:1])


def test_copies_and_data_parallel_halves_add_up(implementation, device):
    layer, x = USUAL.layer(torch.float32, device), USUAL.x(torch.float32, device)
    twin = copy.deepcopy(layer)
    with use_backend(implementation):
        whole = gradients(layer, x)
        first, second = gradients(twin, x[:20]), gradients(twin, x[20:])
    for index in range(2, len(whole)):
        assert cases.error(first[index] + second[index], whole[index].double().cpu()) < 2e-5
    assert_same([torch.cat([first[1], second[1]])], [whole[1]])


def test_choosing_by_name():
    before = get_backend()
    with pytest.raises(BackendError, match=r"expected one of .*'triton'.*, got 'fast'"):
        set_backend("fast")
    with use_backend("reference"):
        assert get_backend() == "reference"
    assert get_backend() == before


@pytest.mark.skipif(cases.TRITON, reason="Triton can run here")
def test_triton_by_name_where_it_cannot_run():
    with pytest.raises(BackendError, match="backend 'triton' cannot run here: "):
        set_backend("triton")


@cases.needs_triton
def test_old_gpus_have_no_triton(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 98 else (8, 0))
    assert choose(torch.device("cuda", 98), torch.float16) == "torch"
    assert choose(torch.device("cuda", 99), torch.float16) == "triton"


@cases.needs_triton
def test_triton_by_name_on_float64(device):
    layer, x = USUAL.layer(torch.float64, device), USUAL.x(torch.float64, device)
    with use_backend("triton"), pytest.raises(BackendError, match=r"the dtype is torch.float64"):
        layer(x)


def test_a_second_derivative_says_what_it_needs(implementation, device):
    layer, x = USUAL.layer(torch.float32, device), USUAL.x(torch.float32, device)
    with use_backend(implementation), pytest.raises(BackendError, match=r"use_backend\('reference'\)"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with use_backend("reference"):
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("derived", [True, False])
def test_a_generators_own_forward_and_hooks_are_called(derived, implementation, device):
    layer, x = USUAL.layer(torch.float32, device), USUAL.x(torch.float32, device)
    factors = layer.doran_adapter.factors
    calls = []
    if derived:

        class Loud(type(factors)):
            def forward(self):
                calls.append("forward")
                return super().forward()

        factors.__class__ = Loud
    else:
        factors.register_forward_hook(lambda *_: calls.append("hook"))
    with use_backend(implementation):
        layer(x)
    assert len(calls) == 1


def test_model_wide_sharing_with_the_trunk_in_another_dtype(implementation, device):
    layer = cases.Case(options={"sharing": "model"}).layer(torch.float32, device)
    trunk = layer.doran_adapter.factors.trunk
    trunk.to(torch.float64)
    with use_backend(implementation):
        assert layer(USUAL.x(torch.float32, device)).isfinite().all()


def test_a_layer_called_again_with_tensors_that_lie_otherwise(implementation, device):
    """What is known of one launch must not be taken for another: sizes, strides and alignment in memory."""
    layer = cases.Case(d_in=64, d_out=96).layer(torch.float32, device)
    rows = torch.randn(50, 70, device=device)
    for tokens, offset in ((48, 0), (48, 0), (48, 1), (48, 3), (16, 0), (17, 1), (48, 0)):
        x = rows[:tokens, offset : offset + 64]
        grad = torch.randn(tokens, 96, device=device)
        expected = cases.answer(layer, x, grad)
        with use_backend(implementation):
            y, gradients = cases.computed(layer, x, grad)
        for key, exact in ({"y": expected[0]} | expected[1]).items():
            assert cases.error(({"y": y} | gradients)[key], exact) <= 1e-5, (key, tokens, offset)
