"""The same layers on a GPU: the start to the bit, the oracle's function and gradients, saving and loading."""

import copy

import oracle
import pytest
import torch
from torch import nn

from doran_core import DoranConfig, adapt, load
from doran_core.layers import wrap
from doran_core.layers.modules import layer_spec, make_factor_builder
from doran_core.layers.stack import StackAdapter, StackView

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: not tested on this machine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 37, 512])
def test_step_zero_is_the_base_layer_to_the_bit(dtype, tokens):
    base = nn.Linear(123, 77).to("cuda", dtype)
    x = torch.randn(tokens, 123, device="cuda", dtype=dtype)
    assert torch.equal(wrap(base, DoranConfig(rank=5))(x), base(x))


def test_a_seed_gives_the_same_networks_on_every_device():
    starts = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48)).to(device)
        handle = adapt(model, DoranConfig(rank=8, target_modules="all-linear"))
        named = model.named_parameters()
        starts.append({name: p.detach().cpu() for name, p in named if ".factors." in name})
        assert len(handle.layers) == 2
    assert len(starts[0]) == 8
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_function_and_gradients_are_the_float64_references(dtype, bound):
    base = nn.Linear(256, 192).to("cuda", dtype)
    layer = wrap(base, DoranConfig(rank=8))
    with torch.no_grad():
        for parameter in layer.doran_adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    x = torch.randn(64, 256, device="cuda", dtype=dtype)
    reference = copy.deepcopy(layer).double().cpu()
    y = layer(x)
    y.float().square().sum().backward()
    expected = reference(x.double().cpu())
    expected.square().sum().backward()
    adapter = reference.doran_adapter
    A, B = adapter.factor_pair()
    tau = adapter.tau.value().detach()
    exact = oracle.linear(
        x.cpu(), reference.base_layer.weight, A.detach(), B.detach(), 2.0, adapter.magnitude.detach(), tau,
        reference.base_layer.bias,
    )  # fmt: skip
    assert torch.allclose(expected, exact, atol=1e-9)
    assert (y.double().cpu() - exact).norm() / exact.norm() < bound
    for (name, ours), theirs in zip(layer.doran_adapter.named_parameters(), adapter.parameters(), strict=True):
        error = (ours.grad.double().cpu() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 5 * bound, name


def test_adapter_trained_on_the_gpu_loads_on_the_cpu(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    base = copy.deepcopy(model)
    handle = adapt(model.cuda(), DoranConfig(rank=2, target_modules="all-linear"))
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.05)
    x = torch.randn(8, 16)
    for _ in range(3):
        optimizer.zero_grad()
        model(x.cuda()).square().sum().backward()
        optimizer.step()
    handle.save(tmp_path / "a")
    load(base, tmp_path / "a")
    assert torch.allclose(base(x), model(x.cuda()).cpu(), atol=1e-4)


@pytest.mark.parametrize("chosen", [None, [1, 3]])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_of_experts_in_bfloat16(transposed, chosen):
    """Scales and gradients against a float64 copy, for all experts and for those that get tokens."""
    holder = nn.Module()
    weight = torch.randn(4, 96, 160) if transposed else torch.randn(4, 160, 96)
    holder.register_parameter("w", nn.Parameter(weight.to("cuda", torch.bfloat16), requires_grad=False))
    view, config = StackView(holder, "w", transposed=transposed), DoranConfig(rank=8)
    spec = layer_spec("w", view, config)
    adapter = StackAdapter(config, spec, make_factor_builder(config)(spec)).cuda()
    adapter.initialise(view)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    holder_64, adapter_64 = copy.deepcopy(holder).double().cpu(), copy.deepcopy(adapter).double().cpu()
    view_64 = StackView(holder_64, "w", transposed=transposed)
    used = list(range(4)) if chosen is None else chosen
    found = []
    for a, v in ((adapter, view), (adapter_64, view_64)):
        experts = None if chosen is None else torch.tensor(chosen, device=a.magnitude.device)
        scale, A, B = a.scale_and_factors(v, experts)
        sum(t[used].square().sum() for t in (scale, A, B)).backward()
        found.append([scale[used], *(p.grad for p in a.parameters())])
    for ours, exact in zip(*found, strict=True):
        assert (ours.double().cpu() - exact).norm() <= 1e-2 * exact.norm()
