"""Weight sides computed together, under checkpointing, offloading, autocast, copies, threads and hooks."""

import copy
import functools
import io
import threading

import cases
import models
import pytest
import torch
from models import PASS_KINDS, assert_close, exact, gradients, make, make_x, outputs, trained
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from doran_core import DoranConfig, adapt
from doran_core.errors import BackendError
from doran_core.kernels import use_backend

pytestmark = pytest.mark.usefixtures("used_implementation")


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
