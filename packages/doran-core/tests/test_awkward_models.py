"""Models that are no plain list of plain layers: tied, aliased, parametrized, reloaded, fused, of mixed precision."""

import copy

import pytest
import torch
from torch import nn

from doran_core import DoranConfig, adapt, load, read_adapter
from doran_core.adapter.evaluate import evaluate
from doran_core.errors import ConfigError, DoranError, NonFiniteError, TargetError
from doran_core.layers import wrap


def shaken(model, targets, **options):
    handle = adapt(model, DoranConfig(**{"rank": 2, "target_modules": targets, **options}))
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if "doran_adapter" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return handle


def assert_merges(handle, x):
    model = handle.model.eval()
    weights = {name: layer.base_layer.weight.detach().clone() for name, layer in handle.layers.items()}
    unmerged = model(x)
    handle.merge()
    merged = model(x)
    with handle.disabled():
        base = model(x)
    assert torch.allclose(merged, unmerged, atol=1e-4)
    assert not torch.allclose(merged, base, atol=1e-3)
    assert torch.equal(model(x), merged)
    handle.unmerge()
    assert torch.equal(model(x), unmerged)
    for name, layer in handle.layers.items():
        assert torch.equal(layer.base_layer.weight, weights[name])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embed(tokens))))


@pytest.mark.parametrize("targets", [["embed", "head"], ["head"], ["embed"]], ids=str)
def test_tied_weights_merge_each_for_itself_and_are_tied_again_after(targets):
    model = Tied()
    handle = shaken(model, targets)
    assert_merges(handle, torch.randint(0, 11, (3, 4)))
    handle.remove()
    assert model.head.weight is model.embed.weight


def test_a_module_under_two_names_is_adapted_under_both():
    model = nn.Sequential()
    model.a = nn.Linear(6, 6)
    model.b = model.a
    base = model.a
    handle = shaken(model, ["a"])
    assert model.a is model.b
    assert_merges(handle, torch.randn(3, 6))
    handle.remove()
    assert model.a is base
    assert model.b is base


def test_channels_last_convolution_merges():
    model = nn.Sequential(nn.Conv2d(3, 6, 3)).to(memory_format=torch.channels_last)
    assert_merges(shaken(model, ["0"]), torch.randn(2, 3, 7, 7).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("change", ["load", "in place", "other memory", "fused optimizer", "cast"])
def test_a_changed_base_weight_is_noticed(change):
    model = nn.Sequential(nn.Linear(8, 6))
    handle = shaken(model, ["0"])
    layer = handle.layers["0"]
    model(torch.randn(2, 8))
    if change == "load":
        layer.load_state_dict({"base_layer.weight": torch.randn(6, 8), "base_layer.bias": torch.randn(6)}, strict=False)
    elif change == "in place":
        with torch.no_grad():
            layer.base_layer.weight.mul_(3)
    elif change == "other memory":
        layer.base_layer.weight.data = torch.randn(6, 8)
    elif change == "fused optimizer":  # which bumps no write counter
        weight = layer.base_layer.weight.requires_grad_(True)
        optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
        for _ in range(2):
            model(torch.randn(2, 8)).square().sum().backward()
            optimizer.step()
    else:
        model.double()
    assert_merges(handle, torch.randn(2, 8, dtype=layer.base_layer.weight.dtype))


def test_loading_base_weights_while_merged_is_refused():
    model = nn.Sequential(nn.Linear(8, 6))
    handle = shaken(model, ["0"])
    state = model.state_dict()
    handle.merge()
    with pytest.raises(DoranError, match="0: its adapter is merged; unmerge it"):
        model.load_state_dict(state)


class Affine(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) + 1


class Nested(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.inner = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "computed by a parametrization"),
        (Affine(4, 4), r"forward of Affine is not x W\^T \+ bias"),
        (Nested(), r"has modules inside \(\['inner'\]\)"),
        (nn.LazyLinear(4), "LazyLinear"),
        (nn.Linear(4, 4, device="meta"), "meta device"),
    ],
)
def test_layers_that_are_more_than_a_weight_are_refused(layer, message):
    with pytest.raises(TargetError, match=message):
        wrap(layer, DoranConfig(), name="proj")


def test_a_subclass_that_is_linear_after_all_is_adapted():
    class Traced(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    base, x = Traced(4, 4), torch.randn(2, 4)
    assert torch.equal(wrap(base, DoranConfig(rank=2))(x), base(x))


def test_a_merge_that_overflows_the_stored_dtype_is_refused():
    model = nn.Sequential(nn.Linear(4, 4).half())
    handle = adapt(model, DoranConfig(rank=2, target_modules=["0"]))
    with torch.no_grad():
        handle.layers["0"].doran_adapter.magnitude.mul_(1e6)
    before = model[0].base_layer.weight.clone()
    with pytest.raises(NonFiniteError, match=r"0: the merged weight has NaN or infinite values in torch.float16"):
        handle.merge(check_finite=True)
    assert torch.equal(model[0].base_layer.weight, before)


def test_a_failure_midway_leaves_the_model_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), Affine(4, 4))
    model[0].bias.requires_grad_(False)
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(TargetError, match="Affine"):
        adapt(model, DoranConfig(rank=2, target_modules=["0", "1"]))
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    handle = adapt(model, DoranConfig(rank=2, target_modules=["0"]))
    handle.save(tmp_path / "a")
    handle.remove()
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(DoranError, match="made for base weights"):
        load(model, tmp_path / "a")
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


@pytest.mark.parametrize("use", ["merge", "unmerge", "remove", "disabled"])
def test_a_removed_handle_says_so(use):
    handle = adapt(nn.Sequential(nn.Linear(4, 4)), DoranConfig(rank=2, target_modules=["0"]))
    handle.remove()
    with pytest.raises(DoranError, match="were removed from the model"):
        handle.disabled().__enter__() if use == "disabled" else getattr(handle, use)()


def test_generators_that_do_not_start_at_the_base_are_refused():
    class Fixed(nn.Module):
        def __init__(self, A, B):
            super().__init__()
            self.A, self.B = A, B

        def forward(self):
            return self.A, self.B

    for A, B, message in (
        (torch.ones(2, 4), torch.ones(4, 2), "B of Fixed is not 0 at the start"),
        (torch.ones(4, 2), torch.zeros(4, 2), r"Fixed gives A \[4, 2\] and B \[4, 2\], expected A \[2, 4\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrap(nn.Linear(4, 4), DoranConfig(rank=2), factor_builder=lambda spec, A=A, B=B: Fixed(A, B))


def test_one_trunk_serves_layers_of_two_precisions():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    handle = shaken(model, ["0", "1"])
    x = torch.randn(2, 4)
    assert model[0](x).dtype == torch.float32
    assert model[1](x.double()).dtype == torch.float64
    assert handle.layers["0"].doran_adapter.factors.trunk is handle.layers["1"].doran_adapter.factors.trunk


def test_a_model_wide_trunk_with_several_ranks_can_be_saved_and_evaluated(tmp_path):
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 4)}) for _ in range(3))
    handle = shaken(model, ["q", "v"], sharing="model", rank_pattern={r"layers\.1\.q": 4, "v": 3})
    handle.save(tmp_path / "a")
    for layer in evaluate(read_adapter(tmp_path / "a")):
        A, B = handle.layers[layer.name].doran_adapter.factor_pair()
        assert torch.equal(layer.A, A)
        assert torch.equal(layer.B, B)


def test_pytorchs_own_encoder_layer_does_not_skip_the_adapter():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    stack = nn.TransformerEncoder(encoder, 2)
    handle = shaken(stack, ["linear1", "linear2"])
    x = torch.randn(2, 5, 8)
    trained = stack.train()(x)
    with torch.no_grad():
        inferred = stack.eval()(x)
    assert torch.allclose(inferred, trained, atol=1e-5)
    with handle.disabled(), torch.no_grad():
        assert not torch.allclose(stack(x), inferred, atol=1e-3)


def test_names_are_copied_from_the_caller_and_checked():
    names = {"1", "0"}
    config = DoranConfig(rank=2, target_modules=names)
    names.clear()
    assert config.target_modules == ["0", "1"]
    model = copy.deepcopy(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert set(adapt(model, config).layers) == {"0", "1"}
    for field, value in (("modules_to_save", "head"), ("target_modules", [0]), ("target_modules", "([")):
        with pytest.raises(ConfigError, match=field):
            DoranConfig(**{field: value})
    with pytest.raises(TargetError, match=r"a string is a regex for the whole name; for the ending, write \['1'\]"):
        adapt(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(4, 4))), DoranConfig(target_modules="1"))
