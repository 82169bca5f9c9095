"""Layers whose weight sides are computed together: against float64, whatever training does around them."""

from types import SimpleNamespace

import cases
import models
import pytest
import torch
from models import PASS_KINDS, assert_close, exact, gradients, make, make_x, outputs
from torch import nn

from doran_core import DoranConfig, adapt

pytestmark = pytest.mark.usefixtures("used_implementation")

OPTIONS = [
    {},
    {"factors": "static"},
    {"factors": "static", "tau_kind": "zero", "norm_grad": "detached"},
    {"tau_granularity": "row"},
    {"tau_granularity": "head", "head_dim": 8},
    {"tau_kind": "fixed", "norm_method": "factored"},
    {"sharing": "none", "activation": "relu"},
    {"sharing": "model"},
    {"sharing": "model", "share_output": True},
    {"share_output": True, "activation": "silu"},
    {"activation": "gelu", "depth": 3},
    {"depth": 1},
    {"experts": True},
    {"rank_pattern": {"q": 5}, "embedding_dim": 33},
    {"rank": 70},
]


@pytest.mark.parametrize("kind", PASS_KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output_and_gradients_against_float64(options, kind, alone):
    if models.BACKEND == "triton" and cases.INTERPRETED and kind == "reentrant":
        pytest.skip("the interpreter is slow: of checkpointing it gets one kind")
    model, x = make(**options), make_x()
    right = exact(model, x)
    model.reentrant = PASS_KINDS[kind]
    for _ in range(2 if cases.DEVICE == "cuda" else 1):  # a second step on a GPU is launched in another way
        assert_close(gradients(model, x), right)
    assert bool(alone) == (kind == "reentrant")


@pytest.mark.parametrize("rank", [8, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_the_reference(dtype, rank):
    if models.BACKEND == "triton" and cases.INTERPRETED and dtype == torch.float16:
        pytest.skip("the interpreter is slow: of the half precisions it gets bfloat16 alone")
    model, x = make(dtype, rank=rank), make_x(dtype)
    right = exact(model, x)
    plain, ours = gradients(model, x, "reference"), gradients(model, x)
    slack = 4 if cases.INTERPRETED else 1  # the interpreter cuts bits off instead of rounding
    for name, value in right.items():
        value = value.double().cpu()
        bound = 1.5 * max(cases.error(plain[name], value), cases.TOLERANCE[dtype])
        assert cases.error(ours[name], value) <= slack * bound, name


@pytest.mark.parametrize("options", [{"tau_kind": "gaussian"}, {"tau_kind": "gaussian", "tau_learn_sigma": True}])
def test_a_gaussian_tau_is_drawn_by_each_layer_and_again_by_its_recomputation(options):
    model, x = make(**options), make_x()
    found = {}
    for kind, reentrant in PASS_KINDS.items():
        model.reentrant = reentrant
        torch.manual_seed(3)
        found[kind] = gradients(model, x)
    torch.manual_seed(3)
    model.reentrant = None
    right = gradients(model, x, "reference")
    for kind in PASS_KINDS:
        assert_close(found[kind], right)
    model.eval()
    assert_close(gradients(model, x), exact(model, x))


@pytest.mark.parametrize("mask", ["expert", "element"])
def test_expert_masks_are_drawn_by_each_layer_and_again_by_its_recomputation(mask):
    model, x = make(experts=True, expert_mask=mask, expert_dropout=0.4), make_x()
    torch.manual_seed(3)
    right = gradients(model, x, "reference")
    for reentrant in PASS_KINDS.values():
        model.reentrant = reentrant
        torch.manual_seed(3)
        assert_close(gradients(model, x), right)
    model.eval()
    model.reentrant = None
    assert_close(gradients(model, x), exact(model, x))


def test_scales_near_zero_and_outputs_written_in_place():
    model, x = make(), make_x()
    with torch.no_grad():
        model.blocks[0].v.doran_adapter.magnitude[::3] *= 1e-4
        model.blocks[1].q.doran_adapter.magnitude[1::5] = 0.0
    model.blocks[2].o.register_forward_hook(lambda module, args, y: y.mul_(3.0))
    assert_close(gradients(model, x), exact(model, x))


def test_outputs_that_are_computed_again_are_chosen_by_sizes_alone():
    choose = models.prepare_module.choose_recomputed
    sizes = [(64, 32), (16, 16), (16, 32), (16, 16)]
    assert choose(sizes, 0.0) == [False] * 4
    assert choose(sizes, 0.5 * 256 / sum(a * b for a, b in sizes)) == [False, True, False, False]
    assert choose(sizes, 1.0) == [True] * 4
    assert choose([], 0.1) == []


def test_recomputed_outputs_have_the_same_gradients(monkeypatch):
    monkeypatch.setattr(models.prepare_module, "choose_recomputed", lambda sizes, share: [True] * len(sizes))
    model, x = make(), make_x()
    for reentrant in (None, False):
        model.reentrant = reentrant
        assert_close(gradients(model, x), exact(model, x))


class Packed(nn.Parameter):
    """A class of its own for a packed weight, such as bitsandbytes has, with what unpacks it beside it."""


class HiddenLinear(nn.Module):
    """A linear layer that shows no weight, as a quantized one."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.packed = Packed(dense.weight.detach()[None].clone(), requires_grad=False)
        self.packed.state = SimpleNamespace(scales={"rows": self.packed.new_ones(dense.out_features, 1)})
        self.bias = dense.bias

    def forward(self, x):
        return nn.functional.linear(x, self.packed[0] * self.packed.state.scales["rows"], self.bias)


@pytest.mark.parametrize("norm_grad", ["full", "detached"])
@pytest.mark.parametrize("kind", PASS_KINDS)
def test_layers_that_hide_their_weight(kind, norm_grad, alone):
    dense, x = make(norm_grad=norm_grad), make_x()
    right = exact(dense, x)
    hidden = models.Model().to(cases.DEVICE)
    for block in hidden.blocks:
        for name, layer in list(block.named_children()):
            setattr(block, name, HiddenLinear(layer))
    adapt(hidden, DoranConfig(target_modules="all-linear", rank=8, alpha=12, norm_grad=norm_grad))
    for mine, theirs in zip(hidden.modules(), dense.modules(), strict=True):
        if isinstance(mine, HiddenLinear):
            mine.packed.copy_(theirs.weight[None])
            if mine.bias is not None:
                mine.bias.data.copy_(theirs.bias)
    hidden.load_state_dict({k: v for k, v in dense.state_dict().items() if "doran_adapter" in k}, strict=False)
    for layer in hidden.modules():
        if hasattr(layer, "doran_adapter"):
            layer.doran_adapter.reset_base(layer.view)
    hidden.reentrant = PASS_KINDS[kind]
    assert_close(gradients(hidden, x), right)
    assert hidden.reentrant or not alone, "they are computed together"
    alone.clear()
    for _ in range(2):
        assert_close({"y": outputs(hidden, x)}, {"y": right["y"]})
    assert len(alone) == 9, "and kept without gradients"
    state = next(m for m in hidden.modules() if isinstance(m, HiddenLinear)).packed.state
    for change in (lambda: state.scales["rows"].neg_(), lambda: state.scales.update(rows=-state.scales["rows"])):
        change()  # the rows keep their norms
        assert_close({"y": outputs(hidden, x)}, {"y": outputs(hidden, x, "reference")})
