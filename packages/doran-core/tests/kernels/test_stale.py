"""Every way in which a weight side could be stale: each change must be seen by the next pass, of either kind."""

import copy
import gc
import weakref

import cases
import models
import pytest
import torch
from models import assert_close, exact, gradients, make, make_x, outputs, trained
from torch import nn

from doran_core import DoranConfig, adapt
from doran_core.kernels import use_backend

pytestmark = pytest.mark.usefixtures("used_implementation")


def adapter_of(model, block=0, name="q"):
    return getattr(model.blocks[block], name).doran_adapter


def written(model):
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.mul_(1.2)


def one_written(model):
    with torch.no_grad():
        adapter_of(model).magnitude.add_(0.3)


def tau_written(model):
    with torch.no_grad():
        adapter_of(model).tau.raw.add_(1.0)


def trunk_written(model):
    with torch.no_grad():
        adapter_of(model).factors.trunk.A.embedding.mul_(1.5)


def weight_written(model):
    with torch.no_grad():
        model.blocks[0].q.base_layer.weight.mul_(0.7)


def bias_written(model):
    with torch.no_grad():
        model.blocks[0].q.base_layer.bias.add_(0.7)


def weight_replaced(model):
    layer = model.blocks[0].q.base_layer
    layer.weight = nn.Parameter(layer.weight.detach() * 1.3, requires_grad=False)


def base_layer_replaced(model):
    layer = model.blocks[0].q
    other = copy.deepcopy(layer.base_layer)
    with torch.no_grad():
        other.weight.mul_(1.3)
    layer.base_layer = other


def data_replaced(model):
    for parameter in trained(model).values():
        parameter.data = parameter.data * 1.1


def parameter_replaced(model):
    adapter = adapter_of(model)
    adapter.magnitude = nn.Parameter(adapter.magnitude.detach() * 1.3)


def tau_replaced(model):
    adapter = adapter_of(model)
    adapter.tau = copy.deepcopy(adapter.tau)
    with torch.no_grad():
        adapter.tau.raw.add_(1.0)


def scaling_changed(model):
    adapter_of(model).scaling *= 3


def state_loaded(model):
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def state_assigned(model):
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=True)


def moved(model):
    model.to(torch.float64).to(torch.float32)
    written(model)


def fused_step(model):
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05, fused=True)
    for parameter in trained(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def refreshed(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    model.handle.refresh()


CHANGES = [
    written, one_written, tau_written, trunk_written, weight_written, bias_written, weight_replaced,
    base_layer_replaced, data_replaced,
    parameter_replaced, tau_replaced, scaling_changed, state_loaded, state_assigned, moved, fused_step,
    refreshed,
]  # fmt: skip


def make_with_handle():
    torch.manual_seed(0)
    model = models.Model().to(cases.DEVICE)
    handle = adapt(model, DoranConfig(target_modules="all-linear", rank=8, alpha=12))
    models.shift(model)
    vars(model)["handle"] = handle
    return model


def fresh(model):
    """A copy with the same values and no memory, to compute what is right."""
    vars(model).pop("handle", None)
    return copy.deepcopy(model)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("before", ["with gradients", "without"])
def test_a_change_is_seen_by_the_next_pass_of_either_kind(change, before):
    model, x = make_with_handle(), make_x()
    (gradients if before == "with gradients" else outputs)(model, x)
    outputs(model, x)
    change(model)
    right = exact(fresh(model), x)
    assert_close({"y": outputs(model, x)}, {"y": right["y"]})
    assert_close(gradients(model, x), right)


def test_weight_sides_are_kept_without_gradients_and_only_there(alone):
    model, x = make(), make_x()
    for _ in range(3):
        outputs(model, x)
    assert len(alone) == 9
    with torch.inference_mode(), use_backend(models.BACKEND):
        model(x)
    assert len(alone) == 9
    gradients(model, x)
    outputs(model, x)
    assert len(alone) == 18


def test_what_inference_mode_keeps_serves_other_passes():
    model, x = make(), make_x()
    with torch.inference_mode(), use_backend(models.BACKEND):
        model(x)
    assert_close({"y": outputs(model, x)}, {"y": exact(model, x)["y"]})
    assert_close(gradients(model, x), exact(model, x))


def test_a_model_loaded_in_inference_mode_is_computed_anew(alone):
    with torch.inference_mode():
        model = make()
        x = make_x()
        for _ in range(2):
            with use_backend(models.BACKEND):
                y = model(x)
        with use_backend("reference"):
            right = model(x)
    assert cases.error(y, right.double().cpu()) < 1e-5
    assert len(alone) == 18


def test_a_backward_pass_ends_what_is_kept():
    model, x = make(), make_x()
    with use_backend(models.BACKEND):
        loss = model(x).square().sum()
        outputs(model, x)
        loss.backward()
        for parameter in trained(model).values():
            parameter.data.mul_(1.1)  # past PyTorch's counters
    assert_close({"y": outputs(model, x)}, {"y": exact(model, x)["y"]})


def test_evaluation_between_the_forward_and_the_backward_of_a_checkpointed_pass():
    model, x = make(), make_x()
    right = exact(model, x)
    model.reentrant = False

    def evaluated(y):
        outputs(model, 0.5 * x)
        with torch.inference_mode(), use_backend(models.BACKEND):
            model(x)
        return y.square().sum()

    assert_close(gradients(model, x, run=evaluated), right)


def test_random_draws_are_not_kept():
    model, x = make(tau_kind="gaussian", tau_init=1.0), make_x()
    assert not torch.equal(outputs(model, x), outputs(model, x))
    model.eval()
    assert torch.equal(outputs(model, x), outputs(model, x))
    model.train()  # what evaluation kept is not used
    assert not torch.equal(outputs(model, x), outputs(model, x))


def test_merged_disabled_and_back(alone):
    model, x = make_with_handle(), make_x()
    y = outputs(model, x)
    handle = model.handle
    handle.merge()
    assert cases.error(outputs(model, x), y.double().cpu()) < 1e-5
    handle.unmerge()
    with handle.disabled():
        assert cases.error(outputs(model, x), y.double().cpu()) > 1e-3
    assert torch.equal(outputs(model, x), y)
    assert len(alone) == 9


def test_a_parameter_changed_during_the_forward_pass():
    model, x = make(), make_x()
    once = []

    def change(module, args):
        if not once:
            once.append(1)
            with torch.no_grad():
                adapter_of(model, 2).magnitude.mul_(1.4)

    model.blocks[1].register_forward_pre_hook(change)
    found = gradients(model, x)
    assert_close(found, exact(model, x))


def test_an_interrupt_leaves_no_window_that_is_used():
    model, x = make(), make_x()

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.blocks[1].register_forward_pre_hook(interrupt)
    with use_backend(models.BACKEND), pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    fused_step(model)
    block = model.blocks[0]
    assert_close(gradients(block, x), exact(block, x))
    assert_close(gradients(model, x), exact(model, x))


def test_an_error_closes_the_window():
    model, x = make(), make_x()
    model.blocks[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with use_backend(models.BACKEND), pytest.raises(ZeroDivisionError):
        model(x)
    assert not models.prepare_module._windows.open


def test_a_base_weight_changed_between_forward_and_backward_is_an_error():
    model, x = make(), make_x()
    with use_backend(models.BACKEND):
        loss = model(x).sum()
        weight_written(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_weight_that_lies_elsewhere_in_the_backward_pass(dtype):
    """fully_shard frees it after the forward pass, and gathers it anew: the same tensor, uncounted, other memory."""
    model, x = make(dtype), make_x(dtype)
    right = gradients(model, x)
    in_its_place = []

    def moved(y):
        for weight in (p for p in model.parameters() if not p.requires_grad):
            storage, values = weight.untyped_storage(), weight.detach().clone()
            size, before = storage.size(), weight.data_ptr()
            storage.resize_(0)
            in_its_place.append(torch.full((size,), 255, dtype=torch.uint8, device=weight.device))
            storage.resize_(size)
            weight.data.copy_(values)
            in_its_place.append(weight.data_ptr() != before)
        return y.square().sum()

    found = gradients(model, x, run=moved)
    assert any(each is True for each in in_its_place), "some weight did move"
    assert_close(found, right, 0.0)


def test_another_backend_between_passes():
    model, x = make(), make_x()
    right = exact(model, x)
    for backend in (models.BACKEND, "torch", "reference", models.BACKEND):
        assert_close({"y": outputs(model, x, backend)}, {"y": right["y"]})
        assert_close(gradients(model, x, backend), right)


def test_nothing_holds_a_model_that_is_gone():
    model, x = make(), make_x()
    gradients(model, x)
    outputs(model, x)
    gone = weakref.ref(model), weakref.ref(adapter_of(model))
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
