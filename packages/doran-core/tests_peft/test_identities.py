"""DoRAN's corner cases against PEFT's own layers: DoRA exactly, and LoRA's function, forward and gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from doran_core import DoranConfig, adapt


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 14)
        self.second = nn.Linear(14, 6, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(30, 14)

    def forward(self, tokens):
        return self.first(tokens)


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, stride=2)

    def forward(self, x):
        return self.first(x)


class ConvolvedIn1d(Convolved):
    def __init__(self):
        nn.Module.__init__(self)
        self.first = nn.Conv1d(3, 8, 5, padding=2)


class ConvolvedIn3d(Convolved):
    def __init__(self):
        nn.Module.__init__(self)
        self.first = nn.Conv3d(2, 6, (1, 2, 3), stride=2)


CASES = {
    "linear": (Net, lambda: torch.randn(9, 20, dtype=torch.float64), ["first", "second"]),
    "embedding": (Embedded, lambda: torch.randint(0, 30, (4, 5)), ["first"]),
    "conv2d": (Convolved, lambda: torch.randn(2, 3, 9, 9, dtype=torch.float64), ["first"]),
    "conv1d": (ConvolvedIn1d, lambda: torch.randn(2, 3, 9, dtype=torch.float64), ["first"]),
    "conv3d": (ConvolvedIn3d, lambda: torch.randn(2, 2, 3, 4, 5, dtype=torch.float64), ["first"]),
}


def lora_factors(layer, kind):
    if kind == "embedding":
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_tau_zero_detached_static_is_pefts_dora(kind, rslora):
    make, draw, targets = CASES[kind]
    torch.manual_seed(0)
    base = make().double()
    theirs = copy.deepcopy(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=True, use_rslora=rslora)
    peft_model = get_peft_model(theirs, config).double()
    handle = adapt(
        base,
        DoranConfig(
            rank=4, alpha=6, target_modules=targets, tau_kind="zero", norm_grad="detached", factors="static",
            use_rslora=rslora,
        ),
    )  # fmt: skip
    layers = {name: peft_model.base_model.model.get_submodule(name) for name in targets}
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = lora_factors(layer, kind)
            A.normal_()
            B.normal_()
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.copy_(magnitude * (1 + 0.3 * torch.randn_like(magnitude)))
            ours = handle.layers[name].doran_adapter
            ours.factors.A.copy_(A.flatten(1))
            ours.factors.B.copy_(B.flatten(1))
            ours.magnitude.copy_(magnitude.flatten())
    x = draw()
    expected, actual = peft_model(x), base(x)
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max()
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    actual.backward(cotangent)
    for name, layer in layers.items():
        A, B = lora_factors(layer, kind)
        ours = handle.layers[name].doran_adapter
        pairs = [
            (ours.factors.A.grad, A.grad),
            (ours.factors.B.grad, B.grad),
            (ours.magnitude.grad, layer.lora_magnitude_vector["default"].weight.grad),
        ]
        for mine, theirs_grad in pairs:
            bound = 1e-6 * theirs_grad.abs().max()
            assert (mine - theirs_grad.reshape(mine.shape)).abs().max() < bound, name


def test_magnitude_that_follows_the_norm_is_pefts_lora():
    """With m = n + tau there is no magnitude left, and W' = W0 + g B A."""
    torch.manual_seed(0)
    base = Net().double()
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"])
    ).double()
    handle = adapt(base, DoranConfig(rank=4, alpha=6, target_modules=["first", "second"], factors="static"))
    with torch.no_grad():
        for name, layer in handle.layers.items():
            lora = theirs.base_model.model.get_submodule(name)
            lora.lora_B["default"].weight.normal_()
            adapter = layer.doran_adapter
            adapter.factors.A.copy_(lora.lora_A["default"].weight)
            adapter.factors.B.copy_(lora.lora_B["default"].weight)
            norm = adapter.norm(layer.view, *adapter.factor_pair())
            adapter.magnitude.copy_(norm + adapter.tau.value())
    x = torch.randn(9, 20, dtype=torch.float64)
    assert torch.allclose(base(x), theirs(x), rtol=1e-9, atol=1e-11)
