"""Weight sides computed together, whichever layers a forward pass calls, and however often."""

import models
import pytest
import torch
from models import PASS_KINDS, assert_close, exact, gradients, make, make_x, trained
from torch.utils.checkpoint import checkpoint

from doran_core.kernels import prepare, use_backend

pytestmark = pytest.mark.usefixtures("used_implementation")


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
