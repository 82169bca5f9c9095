"""Adapted layers to try the implementations on, and the exact answer to each from the formulas in float64."""

import importlib.util
import os
from dataclasses import dataclass, field

import oracle
import pytest
import torch
from torch import nn

from doran_core import DoranConfig
from doran_core.layers import DoranLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = importlib.util.find_spec("triton") is not None and (DEVICE == "cuda" or INTERPRETED)

needs_triton = pytest.mark.skipif(
    not TRITON, reason="needs Triton and a CUDA GPU, or TRITON_INTERPRET=1 (nox -s kernels): not tested here"
)

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative error allowed for the output and for every gradient."""


@dataclass
class Case:
    """One layer: sizes, options and what is done to its parameters before it is tried."""

    tokens: int = 37
    d_in: int = 72
    d_out: int = 123
    rank: int = 8
    bias: bool = True
    options: dict = field(default_factory=dict)
    shift: float = 0.05
    edit: object = None
    inputs: object = None

    def layer(self, dtype, device, seed=0):
        torch.manual_seed(seed)
        base = nn.Linear(self.d_in, self.d_out, bias=self.bias).to(device, dtype)
        layer = DoranLinear(base, DoranConfig(rank=self.rank, alpha=1.5 * self.rank, **self.options))
        with torch.no_grad():
            for parameter in layer.doran_adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * self.shift * parameter.std(correction=0).clamp_min(0.2))
            if self.edit is not None:
                self.edit(layer)
                layer.doran_adapter.reset_base(layer.view)
        return layer

    def x(self, dtype, device):
        x = torch.randn(self.tokens, self.d_in)
        x = x if self.inputs is None else self.inputs(x)
        return x.to(device, dtype).requires_grad_()


def small_scales(layer):
    """Magnitudes of 0 and near it, of both signs, so that c is."""
    layer.doran_adapter.magnitude[::3] *= 1e-4
    layer.doran_adapter.magnitude[1::7] = 0.0
    layer.doran_adapter.magnitude[2::7] *= -1.0


def empty_rows(layer):
    """Rows of W0 and B that are 0: the norm is 0 there."""
    layer.base_layer.weight[::5] = 0.0
    for parameter in (layer.doran_adapter.factors.B,):
        parameter[::5] = 0.0


def tiny_tau(layer):
    layer.doran_adapter.tau.raw.fill_(-25.0)


CASES = {
    "usual": Case(),
    "no bias": Case(bias=False),
    "static": Case(options={"factors": "static"}),
    "one token": Case(tokens=1),
    "one row": Case(d_out=1),
    "odd sizes": Case(tokens=5, d_in=123, d_out=77, rank=3),
    "many tokens": Case(tokens=700, d_in=33, d_out=40),
    "large rank": Case(d_in=96, d_out=80, rank=72),
    "tau per row": Case(options={"tau_granularity": "row"}),
    "tau per head": Case(d_out=120, options={"tau_granularity": "head", "head_dim": 24}),
    "fixed tau": Case(options={"tau_kind": "fixed"}),
    "no tau": Case(options={"tau_kind": "zero"}),
    "tau near zero": Case(edit=tiny_tau),
    "large tau": Case(options={"tau_init": 30.0}),
    "detached norm": Case(options={"norm_grad": "detached"}),
    "factored norm only": Case(options={"norm_method": "factored"}),
    "scale near zero": Case(edit=small_scales),
    "scale near zero, no bias": Case(bias=False, edit=small_scales),
    "rows of zeros": Case(edit=empty_rows, options={"factors": "static"}),
    "rows of zeros, no tau": Case(edit=empty_rows, options={"factors": "static", "tau_kind": "zero"}),
    "shared output layers": Case(options={"sharing": "model", "share_output": True}),
    "relu": Case(options={"activation": "relu"}),
    "gelu, three layers": Case(options={"activation": "gelu", "depth": 3}),
    "wide networks": Case(options={"embedding_dim": 100, "hidden_dim": 50}),
    "experts": Case(options={"experts": True}),
    "strided input": Case(inputs=lambda x: x.T.contiguous().T),
    "three dimensions": Case(tokens=36, inputs=lambda x: x.reshape(4, 9, -1).transpose(0, 1)),
}


def answer(layer, x, grad):
    """``(y, gradients by name)`` in float64 on the CPU: the layer's own parameters through the formulas."""
    twin = DoranLinear(
        nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).double(),
        layer.doran_adapter.config,
    )
    twin.load_state_dict({name: value.double().cpu() for name, value in layer.state_dict().items()})
    adapter, x = twin.doran_adapter, x.detach().double().cpu().requires_grad_()
    A, B = adapter.factor_pair()
    base = twin.base_layer
    norm = row_norm(oracle.direction(base.weight.detach(), A, B, adapter.scaling))
    if adapter.config.norm_grad == "detached":
        norm = norm.detach()
    denominator = norm + adapter.tau.value()
    positive = denominator > 0
    scale = torch.where(positive, adapter.magnitude / torch.where(positive, denominator, 1.0), 0.0)
    y = scale * (x @ oracle.direction(base.weight.detach(), A, B, adapter.scaling).T)
    y = y if base.bias is None else y + base.bias.detach()
    y.backward(grad.double().cpu())
    gradients = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    return y.detach(), gradients | {"x": x.grad}


def row_norm(V):
    """The norm of each row, with gradient 0 where it is 0."""
    square = V.pow(2).sum(1)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def computed(layer, x, grad):
    """The same from the layer."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    gradients = {name: parameter.grad for name, parameter in layer.doran_adapter.named_parameters()}
    return y.detach(), gradients | {"x": x.grad}


def error(actual, expected):
    """Relative error in the Frobenius norm, and absolute where the answer is 0."""
    difference = (actual.double().cpu() - expected).norm()
    return (difference / expected.norm()).item() if expected.norm() > 0 else difference.item()
