"""Many layers whose weight sides are computed together: against float64, and whatever training does around them."""

import copy
import functools
import io

import cases
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from doran_core import DoranConfig, adapt
from doran_core.errors import BackendError
from doran_core.kernels import dispatch, use_backend
from doran_core.kernels.fleet import Fleet

pytestmark = cases.needs_triton


class Block(nn.Module):
    """Layers of three shapes, with and without a bias."""

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


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Model().to(cases.DEVICE, dtype)
    options = {"rank": 8, "alpha": 12} | options
    adapt(model, DoranConfig(target_modules="all-linear", **options))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std(correction=0).clamp_min(0.2))
    return model


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_x(dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    return torch.randn(2, 5, 16).to(cases.DEVICE, dtype)


def gradients(model, x, backend="triton", run=None):
    """The output, and every gradient by name; None where there is none."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with use_backend(backend):
        y = model(x)
        (y.square().sum() if run is None else run(y)).backward()
    found = {name: parameter.grad for name, parameter in trained(model).items()}
    return {"y": y.detach(), "x": x.grad} | found


def assert_close(ours, expected, tolerance=1e-5):
    assert ours.keys() == expected.keys()
    for name, exact in expected.items():
        if exact is None:
            assert ours[name] is None, name
        else:
            assert cases.error(ours[name], exact.double().cpu()) <= tolerance, name


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Lets the layers of these tests be float32, so that the bounds can be close."""
    monkeypatch.setattr(dispatch, "PREPARED_DTYPES", [*dispatch.PREPARED_DTYPES, torch.float32])


@pytest.fixture
def served(monkeypatch):
    """How often a layer got its part of a weight side, how often it did not, and how often one was made."""
    counts = {"together": 0, "alone": 0, "made": 0}
    from doran_core.kernels import weight_side  # which imports Triton

    ask, make = Fleet.ask, weight_side.make_sides

    def counted(self, member, view):
        given = ask(self, member, view)
        counts["alone" if given is None else "together"] += 1
        return given

    def made(*args, **kwargs):
        counts["made"] += 1
        return make(*args, **kwargs)

    monkeypatch.setattr(Fleet, "ask", counted)
    monkeypatch.setattr(weight_side, "make_sides", made)
    return counts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tau_granularity": "row"},
        {"tau_granularity": "head", "head_dim": 8},
        {"tau_kind": "fixed", "norm_grad": "detached"},
        {"sharing": "none", "activation": "relu"},
        {"rank_pattern": {"q": 5}, "embedding_dim": 33},
        {"rank": 70},
        {"rank": 9, "hidden_dim": 80, "sharing": "none", "tau_granularity": "row"},
    ],
    ids=str,
)
def test_output_and_gradients_against_float64(options, served):
    model, x = make(**options), make_x()
    exact = gradients(copy.deepcopy(model).double(), x.double(), "reference")
    steps = 1 if cases.INTERPRETED else 2  # a second step on a GPU is launched in another way
    for _ in range(steps):
        assert_close(gradients(model, x), exact)
    families = 2 if "rank_pattern" in options else 1
    assert served == {"together": 9 * steps, "alone": 0, "made": steps * families}


@pytest.mark.parametrize("rank", [8, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_the_plain_path(dtype, rank):
    if cases.INTERPRETED and dtype == torch.float16:
        pytest.skip("the interpreter is slow: of the half precisions it gets bfloat16 alone")
    model, x = make(dtype, rank=rank), make_x(dtype)
    exact = gradients(copy.deepcopy(model).double(), x.double(), "reference")
    plain, ours = gradients(model, x, "reference"), gradients(model, x)
    slack = 4 if cases.INTERPRETED else 1  # the interpreter cuts bits off instead of rounding
    for name, right in exact.items():
        right = right.double().cpu()
        bound = max(1.5 * cases.error(plain[name], right), cases.TOLERANCE[dtype])
        assert cases.error(ours[name], right) <= slack * bound, name


def test_reentrant_checkpointing_goes_layer_by_layer(served):
    model, x = make(), make_x()
    expected = gradients(model, x, "reference")
    model.reentrant = True
    assert_close(gradients(model, x), expected)
    assert served["together"] == 0


def test_checkpointing(served):
    model, x = make(), make_x()
    expected = gradients(model, x, "reference")
    model.reentrant = False
    for step in (1, 2):
        assert_close(gradients(model, x), expected)
        assert served == {"together": 18 * step, "alone": 0, "made": step}  # each layer is called twice


def test_two_checkpointed_passes_before_their_backward_passes():
    model, x = make(), make_x()
    model.reentrant = False
    found = []
    for backend in ("reference", "triton"):
        model.zero_grad()
        with use_backend(backend):
            losses = [model(x * factor).square().sum() for factor in (1.0, 0.5)]
            losses[1].backward()
            with torch.no_grad():
                model(x)
            losses[0].backward()
        found.append({name: parameter.grad for name, parameter in trained(model).items()})
    assert_close(found[1], found[0])


def test_a_checkpointed_layer_that_is_called_more_often_than_the_others(served):
    model, x = make(), make_x()
    first = model.blocks[0]
    model.forward = lambda x: [x := checkpoint(first, x, use_reentrant=False) for _ in range(4)][-1]
    with torch.no_grad():
        first.v.doran_adapter.magnitude[::3] *= 1e-4
    assert_close(gradients(model, x), gradients(model, x, "reference"))
    assert served == {"together": 24, "alone": 0, "made": 1}


def test_one_layer_called_twice_of_whose_outputs_one_is_written_to(served):
    model, x = make(), make_x()
    layer, written = model.blocks[0].q, []

    def forward(x):
        y = checkpoint(layer, x, use_reentrant=False)
        y = torch.cat([y, checkpoint(layer, x * 0.5, use_reentrant=False).mul_(2.0)])
        written.append(1)
        return y

    model.forward = forward
    assert_close(gradients(model, x), gradients(model, x, "reference"))
    assert written
    assert served["alone"] == 0


def test_outputs_that_others_keep_are_not_computed_again():
    model, x = make(), make_x()
    model.blocks[0].q.register_forward_hook(lambda module, args, y: y.sin())  # the sine keeps its input
    names = {id(m.doran_adapter): name for name, m in model.named_modules() if hasattr(m, "doran_adapter")}
    fleet = model.blocks[0].q.doran_adapter.factors.fleet
    chosen = []
    for _ in range(3):
        with use_backend("triton"):
            y = model(x.detach().requires_grad_())
        (group,) = fleet._groups[x.device]
        again = zip(group.members, group.family._recomputed, strict=True)
        chosen.append({names[member] for member, recomputes in again if recomputes})
        y.sum().backward()
    assert chosen == [{"blocks.0.q"}, {"blocks.1.q"}, {"blocks.1.q"}]  # a product keeps what the v make
    assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_offloaded_activations(served):
    model, x = make(), make_x()
    expected = gradients(model, x, "reference")
    with torch.autograd.graph.save_on_cpu():
        assert_close(gradients(model, x), expected)
    assert served == {"together": 9, "alone": 0, "made": 1}


def test_the_first_checkpointed_pass_of_a_copy(served):
    model, x = make(), make_x()
    first = model.blocks[0]
    other = copy.deepcopy(first)
    model.forward = lambda x: checkpoint(first, checkpoint(first, x, use_reentrant=False), use_reentrant=False)
    expected = gradients(model, x, "reference")
    first = other
    found = gradients(model, x)
    assert_close({"y": found["y"], "x": found["x"]}, {"y": expected["y"], "x": expected["x"]})
    gradient = dict(other.named_parameters())["q.doran_adapter.magnitude"].grad
    assert_close({"m": gradient}, {"m": expected["blocks.0.q.doran_adapter.magnitude"]})
    assert served["alone"] == 0


def test_checkpointed_and_other_calls_of_a_layer_in_one_pass():
    model, x = make(), make_x()
    first, second = model.blocks[0], model.blocks[1]
    model.forward = lambda x: second(first(first(checkpoint(first, x, use_reentrant=False))))
    assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_selective_checkpointing(served):
    model, x = make(), make_x()
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
    context = functools.partial(create_selective_checkpoint_contexts, kept)
    model.forward = lambda x: [
        x := checkpoint(block, x, use_reentrant=False, context_fn=context) for block in model.blocks
    ][-1]
    assert_close(gradients(model, x), gradients(model, x, "reference"))
    assert served["together"] == 0


def test_layers_that_are_frozen_and_thawed_without_a_backward_pass():
    model, x = make(sharing="none"), make_x()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    with use_backend("triton"):
        model.blocks[1](x)
    for parameter in trained(model.blocks[1]).values():
        parameter.requires_grad_(False)
    for name, parameter in model.blocks[0].named_parameters():
        parameter.requires_grad_("doran_adapter" in name)
    assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_networks_that_share_an_embedding_alone():
    model, x = make(), make_x()
    trunk = model.blocks[0].q.doran_adapter.factors.trunk
    trunk.B.embedding = trunk.A.embedding
    assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_a_step_of_one_part_before_the_backward_pass_of_another():
    model, x = make(), make_x()
    found = []
    for backend in ("reference", "triton"):
        part = copy.deepcopy(model)
        with use_backend(backend):
            losses = [block(x).square().sum() for block in part.blocks[:2]]
            losses[0].backward()
            with torch.no_grad():
                for parameter in trained(part.blocks[0]).values():
                    parameter.sub_(0.1 * parameter.grad)
            losses[1].backward()
        found.append({name: parameter.grad for name, parameter in trained(part.blocks[1]).items()})
    assert_close(found[1], found[0])


def test_gradients_of_the_input_alone_leave_nothing_behind():
    model, x = make(), make_x()
    with use_backend("triton"):
        leaf = x.detach().requires_grad_()
        y = model(leaf).square().sum()
        for _ in range(2):
            torch.autograd.grad(y, leaf, retain_graph=True)
    (now,) = model.blocks[0].q.doran_adapter.factors.fleet._now.values()
    parts = list(now._issued.values())
    assert len(parts) == 9
    assert not any(part.plain.side.sent for part in parts)


@pytest.mark.parametrize("rank", [4, 70])
def test_a_backward_pass_under_autocast(rank):
    model, x = make(torch.bfloat16, rank=rank), make_x(torch.bfloat16)
    exact = gradients(copy.deepcopy(model).double(), x.double(), "reference")

    def run(y):
        return y.square().sum()

    plain = gradients(model, x, run=run)
    with torch.autocast(cases.DEVICE, torch.bfloat16):
        ours = gradients(model, x, run=run)
    for name, right in exact.items():
        bound = max(1.5 * cases.error(plain[name], right.double().cpu()), cases.TOLERANCE[torch.bfloat16])
        assert cases.error(ours[name], right.double().cpu()) <= bound, name


def test_a_weight_that_changed_before_an_inference_pass():
    model, x = make(), make_x()
    gradients(model, x)
    with torch.no_grad():
        model.blocks[0].q.base_layer.weight.mul_(0.7)
    with torch.inference_mode(), use_backend("triton"):
        model(x)
    assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_a_new_base_weight_in_a_checkpointed_pass():
    model, x = make(), make_x()
    model.reentrant = False
    gradients(model, x)
    with torch.no_grad():
        model.blocks[1].q.base_layer.weight.mul_(0.7)
    for _ in range(2):
        assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_a_backward_pass_that_failed_leaves_nothing_behind():
    model, x = make(), make_x()
    expected = gradients(model, x, "reference")
    with use_backend("triton"):
        model.zero_grad()
        leaf = x.detach().requires_grad_()
        loss = model(leaf).square().sum()
        stop = leaf.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            loss.backward(retain_graph=True)
        stop.remove()
        model.zero_grad()
        leaf.grad = None
        loss.backward()
    assert_close({name: p.grad for name, p in trained(model).items()}, {n: expected[n] for n in trained(model)})


def test_checkpointing_after_a_pass_without_it():
    model, x = make(), make_x()
    with use_backend("triton"):
        model(x)  # a weight side that no backward pass goes through
    for parameter in trained(model).values():
        parameter.data.mul_(1.1)
    model.reentrant = True
    assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_scales_near_zero_and_outputs_written_in_place():
    model, x = make(), make_x()
    with torch.no_grad():
        model.blocks[0].v.doran_adapter.magnitude[::3] *= 1e-4
        model.blocks[1].q.doran_adapter.magnitude[1::5] = 0.0
    model.blocks[2].o.register_forward_hook(lambda module, args, y: y.mul_(3.0))
    exact = gradients(copy.deepcopy(model).double(), x.double(), "reference")
    assert_close(gradients(model, x), exact)


def test_dropout_draws_what_the_reference_draws():
    model, x = make(dropout=0.4), make_x()
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        found.append(gradients(model, x, backend))
    assert_close(found[1], found[0])


def test_layers_that_a_pass_leaves_out(served):
    model, x = make(), make_x()
    model.blocks[1].skipped = True
    expected = gradients(model, x, "reference")
    assert expected["blocks.1.q.doran_adapter.magnitude"] is None
    for _ in range(2):
        assert_close(gradients(model, x), expected)
    model.blocks[1].skipped = False
    assert_close(gradients(model, x), gradients(model, x, "reference"))
    assert served["alone"] == 0


def test_a_layer_that_is_called_more_often_than_the_others(served):
    model, x = make(), make_x()
    first = model.blocks[0]
    model.forward = lambda x: [x := first(x) for _ in range(4)][-1]
    assert_close(gradients(model, x), gradients(model, x, "reference"))
    assert served == {"together": 3, "alone": 9, "made": 1}


def test_two_passes_before_their_backward_passes(served):
    model, x = make(), make_x()
    expected = {}
    for name, retain in (("reference", False), ("triton", True)):
        model.zero_grad()
        with use_backend(name):
            losses = [model(x * factor).square().sum() for factor in (1.0, 0.5)]
            for loss in losses:
                loss.backward(retain_graph=retain)
            if retain:  # once more through the same graph
                before = {key: parameter.grad.clone() for key, parameter in trained(model).items()}
                losses[0].backward()
                losses[1].backward()
                assert_close({key: p.grad / 2 for key, p in trained(model).items()}, before)
            else:
                expected = {key: parameter.grad.clone() for key, parameter in trained(model).items()}
    assert_close(before, expected)
    assert served["made"] == 2


def test_a_change_past_pytorchs_counters_is_seen_after_a_backward_pass():
    model, x = make(), make_x()
    gradients(model, x)
    for parameter in trained(model).values():
        parameter.data.mul_(1.1)
    assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_a_parameter_changed_between_forward_and_backward_is_an_error():
    model, x = make(), make_x()
    with use_backend("triton"):
        loss = model(x).sum()
        with torch.no_grad():
            model.blocks[0].q.doran_adapter.magnitude.add_(1.0)
        with pytest.raises(RuntimeError, match="changed in place between a forward pass and its backward pass"):
            loss.backward()


def test_tensors_that_move_between_forward_and_backward():
    model, x = make(), make_x()
    expected = gradients(model, x, "reference")

    def moved(y):
        for parameter in model.parameters():
            old = parameter.data
            parameter.data = old.clone()
            old.fill_(float("nan"))
        return y.square().sum()

    found = gradients(model, x, run=moved)
    del found["x"], expected["x"]  # autograd itself keeps what W0 was
    assert_close(
        {name: found[name] for name in found if "w2_A" in name or "magnitude" in name},
        {name: expected[name] for name in expected if "w2_A" in name or "magnitude" in name},
    )


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_a_copy_of_a_model_has_a_life_of_its_own(duplicate, served):
    model, x = make(), make_x()
    expected = gradients(model, x, "reference")
    gradients(model, x)
    served.update(alone=0)
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
    for _ in range(2):
        assert_close(gradients(other, x), expected)
    assert served["alone"] == 0


def test_frozen_parts_get_no_gradient():
    model, x = make(), make_x()
    for name, parameter in model.named_parameters():
        if "magnitude" in name or "blocks.1" in name:
            parameter.requires_grad_(False)
    assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_layers_below_the_trained_ones_have_no_graph():
    model, x = make(sharing="none"), make_x()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    with use_backend("triton"):
        assert not model.blocks[0](x).requires_grad
        assert model(x).requires_grad


def test_options_and_modules_that_change_between_passes():
    model, x = make(), make_x()
    gradients(model, x)
    model.blocks[0].q.doran_adapter.scaling *= 3
    model.blocks[1].v.doran_adapter.tau = copy.deepcopy(model.blocks[2].v.doran_adapter.tau)
    with torch.no_grad():
        model.blocks[1].v.doran_adapter.tau.raw.add_(1.0)
    assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_a_new_base_weight_and_a_new_parameter_are_noticed():
    model, x = make(), make_x()
    gradients(model, x)
    with torch.no_grad():
        model.blocks[0].q.base_layer.weight.mul_(0.7)
    adapter = model.blocks[2].o.doran_adapter
    adapter.magnitude = nn.Parameter(adapter.magnitude.detach() * 1.3)
    assert_close(gradients(model, x), gradients(model, x, "reference"))


def test_a_hook_on_the_factors_sees_its_calls(served):
    model, x = make(), make_x()
    seen = []
    model.blocks[0].v.doran_adapter.factors.register_forward_hook(lambda *args: seen.append(1))
    assert_close(gradients(model, x), gradients(model, x, "reference"))
    assert len(seen) == 2
    assert served["alone"] == 1


def test_the_second_derivative_is_refused():
    model, x = make(), make_x()
    with use_backend("triton"):
        loss = model(x).sum()
    with pytest.raises(BackendError, match="create_graph"):
        torch.autograd.grad(loss, list(trained(model).values()), create_graph=True)
