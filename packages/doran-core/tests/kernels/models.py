"""A small model of several adapted layers, its gradients, and the float64 answer to them."""

import copy
import importlib

import cases
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from doran_core import DoranConfig, adapt
from doran_core.kernels import use_backend

prepare_module = importlib.import_module("doran_core.kernels.prepare")
BACKEND = "triton" if cases.TRITON else "torch"
PASS_KINDS = {"plain": None, "checkpoint": False, "reentrant": True}
"""Ways to call a block, and for each of them `Model.reentrant`."""


class Block(nn.Module):
    """Layers of two shapes, with and without a bias."""

    def __init__(self, bias):
        super().__init__()
        self.q = nn.Linear(16, 24, bias=bias)
        self.v = nn.Linear(16, 24, bias=False)
        self.o = nn.Linear(24, 16)
        self.skipped = False

    def forward(self, x):
        return x if self.skipped else x + self.o(torch.tanh(self.q(x)) * self.v(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(bias=index % 2 == 0) for index in range(3))
        self.reentrant = None

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def shift(model):
    """Moves every trained parameter away from its start."""
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std(correction=0).clamp_min(0.2))
    return model


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Model().to(cases.DEVICE, dtype)
    adapt(model, DoranConfig(target_modules="all-linear", **({"rank": 8, "alpha": 12} | options)))
    return shift(model)


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_x(dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    return torch.randn(2, 5, 16).to(cases.DEVICE, dtype)


def gradients(model, x, backend=BACKEND, run=None):
    """The output, and every gradient by name; None where there is none."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with use_backend(backend):
        y = model(x)
        (y.square().sum() if run is None else run(y)).backward()
    found = {name: parameter.grad for name, parameter in trained(model).items()}
    return {"y": y.detach(), "x": x.grad} | found


def exact(model, x):
    """:func:`gradients` of the formulas in float64."""
    twin = copy.deepcopy(model).double()
    return gradients(twin, x.double(), "reference")


def outputs(model, x, backend=BACKEND):
    with use_backend(backend), torch.no_grad():
        return model(x)


def assert_close(ours, expected, tolerance=1e-5):
    assert ours.keys() == expected.keys()
    for name, right in expected.items():
        if right is None:
            assert ours[name] is None, name
        else:
            assert ours[name] is not None, name
            allowed = tolerance * (10 if right.numel() == 1 else 1)  # one number may be a sum that cancels
            assert cases.error(ours[name], right.double().cpu()) <= allowed, name
