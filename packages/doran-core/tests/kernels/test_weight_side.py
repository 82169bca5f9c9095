"""Layers whose weight sides are computed together: against float64, whatever training does around them."""

import copy
import functools
import io
import threading

import cases
import models
import pytest
import torch
from models import assert_close, exact, gradients, make, make_x, outputs, trained
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from doran_core import DoranConfig, adapt
from doran_core.errors import BackendError
from doran_core.kernels import prepare, use_backend

PASS_KINDS = {"plain": None, "checkpoint": False, "reentrant": True}
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


@pytest.fixture
def alone(monkeypatch):
    """How often a layer computed its weight side by itself."""
    calls = []
    compute = models.prepare_module.compute_alone
    monkeypatch.setattr(models.prepare_module, "compute_alone", lambda *args: calls.append(args) or compute(*args))
    return calls


@pytest.fixture(autouse=True)
def _implementation(implementation, monkeypatch):
    monkeypatch.setattr(models, "BACKEND", implementation)
    monkeypatch.setattr(models.gradients, "__defaults__", (implementation, None))
    monkeypatch.setattr(models.outputs, "__defaults__", (implementation,))


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


# Which layers a pass calls, and how often


def test_layers_that_a_pass_leaves_out_have_no_gradient(alone):
    model, x = make(), make_x()
    model.blocks[1].skipped = True
    right = exact(model, x)
    assert right["blocks.1.q.doran_adapter.magnitude"] is None
    assert_close(gradients(model, x), right)
    model.blocks[1].skipped = False
    assert_close(gradients(model, x), exact(model, x))
    assert not alone


@pytest.mark.parametrize("reentrant", [None, False])
def test_layers_that_are_called_several_times(reentrant, alone):
    model, x = make(), make_x()
    first, second = model.blocks[0], model.blocks[1]

    def again(x):
        return x if reentrant is None else checkpoint(lambda t: first(t), x, use_reentrant=reentrant)

    model.forward = lambda x: second(again(first(again(x)))) + first(x).mul_(0.5)
    assert_close(gradients(model, x), gradients(model, x, "reference"))
    assert not alone


def test_a_layer_in_two_places():
    model, x = make(), make_x()
    model.blocks[2].q = model.blocks[0].q
    prepare(model)
    right = exact(model, x)
    assert_close(gradients(model, x), right)


def test_a_block_called_by_itself_computes_its_own(alone):
    model, x = make(), make_x()
    gradients(model, x)
    block = model.blocks[1]
    assert_close(gradients(block, x), exact(block, x))
    assert len(alone) == 3


@pytest.mark.parametrize("kind", ["plain", "checkpoint"])
def test_two_forward_passes_before_their_backward_passes(kind):
    model, x = make(), make_x()
    model.reentrant = PASS_KINDS[kind]
    found = []
    for backend in ("reference", models.BACKEND):
        model.zero_grad()
        with use_backend(backend):
            losses = [model(x * factor).square().sum() for factor in (1.0, 0.5)]
            losses[1].backward()
            with torch.no_grad():
                model(x)
            losses[0].backward()
        found.append({name: parameter.grad for name, parameter in trained(model).items()})
    assert_close(found[1], found[0])


def test_two_forward_passes_of_different_layers_and_one_backward_pass():
    model, x = make(), make_x()

    def both(y):
        model.blocks[1].skipped = True
        other = model(0.5 * x)
        model.blocks[1].skipped = False
        return y.square().sum() + other.square().sum()

    right = gradients(model, x, "reference", both)
    assert_close(gradients(model, x, run=both), right)


def test_gradients_add_up_over_passes_and_through_a_retained_graph():
    model, x = make(), make_x()
    once = gradients(model, x)
    model.zero_grad()
    with use_backend(models.BACKEND):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        model(x).square().sum().backward()
    assert_close(
        {name: p.grad / 3 for name, p in trained(model).items()}, {name: once[name] for name in trained(model)}
    )


def test_gradients_of_the_input_alone():
    model, x = make(), make_x()
    right = exact(model, x)
    with use_backend(models.BACKEND):
        leaf = x.detach().requires_grad_()
        loss = model(leaf).square().sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert_close({"x": grad}, {"x": right["x"]})


def test_frozen_parts_have_no_gradient_and_no_graph():
    model, x = make(sharing="none"), make_x()
    for name, parameter in model.named_parameters():
        if "magnitude" in name or "blocks.0" in name:
            parameter.requires_grad_(False)
    assert_close(gradients(model, x), exact(model, x))
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, y: seen.append(y.requires_grad))
    with use_backend(models.BACKEND):
        assert model(x).requires_grad
    assert seen == [False]


def test_layers_that_are_frozen_and_thawed_between_passes():
    model, x = make(), make_x()
    for frozen in ("blocks.0", "blocks.1"):
        for name, parameter in model.named_parameters():
            if "doran_adapter" in name:
                parameter.requires_grad_(frozen not in name)
        assert_close(gradients(model, x), exact(model, x))


# What surrounds the layers


def test_checkpointing_of_the_whole_model(alone):
    model, x = make(), make_x()
    right = exact(model, x)
    for reentrant in (False, True):
        model.zero_grad()
        with use_backend(models.BACKEND):
            leaf = x.detach().requires_grad_()
            checkpoint(model, leaf, use_reentrant=reentrant).square().sum().backward()
        assert_close({n: p.grad for n, p in trained(model).items()}, {n: right[n] for n in trained(model)})
    assert len(alone) == 9  # the reentrant kind's first pass, without gradients


def test_a_checkpointed_block_outside_of_the_model(alone):
    model, x = make(), make_x()
    gradients(model, x)
    block = model.blocks[0]
    right = exact(block, x)
    model.reentrant = False
    gradients(model, x)
    with use_backend(models.BACKEND):
        block.zero_grad()
        leaf = x.detach().requires_grad_()
        checkpoint(block, leaf, use_reentrant=False).square().sum().backward()
    assert_close({"x": leaf.grad}, {"x": right["x"]})
    assert len(alone) == 6


def test_selective_checkpointing():
    model, x = make(), make_x()
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
    context = functools.partial(create_selective_checkpoint_contexts, kept)
    right = exact(model, x)
    model.forward = lambda x: [
        x := checkpoint(block, x, use_reentrant=False, context_fn=context) for block in model.blocks
    ][-1]
    assert_close(gradients(model, x), right)


def test_offloaded_activations(alone):
    model, x = make(), make_x()
    with torch.autograd.graph.save_on_cpu():
        assert_close(gradients(model, x), exact(model, x))
    assert not alone


@pytest.mark.parametrize("kind", PASS_KINDS)
def test_dropout_draws_what_the_reference_draws(kind):
    model, x = make(dropout=0.4), make_x()
    model.reentrant = PASS_KINDS[kind]
    found = []
    for backend in ("reference", models.BACKEND):
        torch.manual_seed(3)
        found.append(gradients(model, x, backend))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_over_a_float32_model(outside):
    model, x = make(), make_x()
    if not outside:  # as accelerate does: hooks of the model run before autocast begins
        inner = model.forward
        model.forward = lambda x: _under_autocast(inner, x)
    found = []
    for backend in ("reference", models.BACKEND):
        with torch.autocast(cases.DEVICE, torch.bfloat16, enabled=outside):
            found.append(gradients(model, x, backend))
    assert_close(found[1], found[0], 4e-2)


def _under_autocast(call, x):
    with torch.autocast(cases.DEVICE, torch.bfloat16):
        return call(x)


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


class HiddenLinear(nn.Module):
    """A linear layer that shows no weight, as a quantized one."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.register_buffer("packed", dense.weight.detach()[None])
        self.bias = dense.bias

    def forward(self, x):
        return nn.functional.linear(x, self.packed[0], self.bias)


@pytest.mark.parametrize("norm_grad", ["full", "detached"])
@pytest.mark.parametrize("kind", PASS_KINDS)
def test_layers_that_hide_their_weight(kind, norm_grad):
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
    assert_close({"y": outputs(hidden, x)}, {"y": right["y"]})


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_a_copy_of_a_model_has_a_life_of_its_own(duplicate, alone):
    model, x = make(), make_x()
    right = exact(model, x)
    gradients(model, x)
    outputs(model, x)
    if duplicate == "deepcopy":
        other = copy.deepcopy(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.zero_()
    alone.clear()
    assert_close(gradients(other, x), right)
    assert not alone
    assert_close({"y": outputs(other, x)}, {"y": right["y"]})


def test_threads_have_windows_of_their_own():
    model, x = make(), make_x()
    right = gradients(model, x)
    found = []

    def other():
        found.append(gradients(copy.deepcopy(model), x))

    def meanwhile(y):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return y.square().sum()

    assert_close(gradients(model, x, run=meanwhile), right)
    assert_close(found[0], right)


def test_the_second_derivative_is_refused():
    model, x = make(), make_x()
    with use_backend(models.BACKEND):
        loss = model(x).sum()
    with pytest.raises(BackendError, match="create_graph"):
        torch.autograd.grad(loss, list(trained(model).values()), create_graph=True)


def test_a_hook_on_the_factors_sees_its_calls():
    model, x = make(), make_x()
    seen = []
    model.blocks[0].v.doran_adapter.factors.register_forward_hook(lambda *args: seen.append(1))
    with use_backend(models.BACKEND):
        model(x)
    assert len(seen) == 1


def test_a_function_transform_takes_the_reference():
    model, x = make(), make_x()
    with use_backend(models.BACKEND):
        grad = torch.func.grad(lambda t: model(t).square().sum())(x)
    assert_close({"x": grad}, {"x": exact(model, x)["x"]})


def test_the_handle_takes_the_hooks_away():
    torch.manual_seed(0)
    model = models.Model()
    handle = adapt(model, DoranConfig(target_modules="all-linear", rank=2))
    assert model._forward_pre_hooks
    handle.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_nothing_is_computed_for_layers_that_do_not_ask(monkeypatch):
    model, x = make(), make_x()
    calls = []
    compute = models.prepare_module.LayerGroup.compute
    monkeypatch.setattr(models.prepare_module.LayerGroup, "compute", lambda self: calls.append(1) or compute(self))
    for block in model.blocks:
        block.skipped = True
    with use_backend(models.BACKEND):
        model(x)
    assert not calls
    model.blocks[0].skipped = False
    gradients(model, x)
    assert len(calls) == 2  # one for each shape
