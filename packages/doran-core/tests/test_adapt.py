"""adapt() and its handle on plain modules: targets, training, saving in both forms, merging, removing, errors."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import doran_core
from doran_core import DoranConfig, adapt, load, read_adapter, read_folded
from doran_core.adapter import TrainableAdapter, write_trainable
from doran_core.errors import AdapterFormatError, BaseMismatchError, ConfigError, DoranError, TargetError
from doran_core.layers import DoranLinear
from doran_core.targets import find_targets


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width // 2, bias=False)
        self.out = nn.Linear(width // 2, width)

    def forward(self, x):
        return x + self.out(torch.tanh(self.q_proj(x))[..., :8] * self.v_proj(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.conv(x[:, None])[:, 0]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


TOKENS = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(3))
EVERYTHING = ["q_proj", "v_proj", "embed", "conv"]


def config(**options):
    return DoranConfig(**{"rank": 4, "target_modules": ["q_proj", "v_proj"], **options})


def train(handle, steps=5):
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(handle.model(TOKENS), torch.arange(6) % 3) + handle.penalty()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    "options", [{}, {"factors": "static"}, {"sharing": "model", "share_output": True}, {"factor_penalty": 0.1}], ids=str
)
def test_life_of_an_adapter(options, tmp_path):
    net = Net()
    base = copy.deepcopy(net)
    handle = adapt(net, config(target_modules=EVERYTHING, modules_to_save=["head"], **options))
    assert torch.equal(net(TOKENS), base(TOKENS))
    first = train(handle, 1)
    assert train(handle, 20) < first
    trained = net.eval()(TOKENS)

    handle.save(tmp_path / "trainable", base_model="net")
    handle.save(tmp_path / "folded", form="folded")
    fresh = copy.deepcopy(base)
    again = load(fresh, tmp_path / "trainable")
    assert torch.equal(fresh.eval()(TOKENS), trained)
    assert again.config == handle.config

    folded = read_folded(tmp_path / "folded")
    assert folded.base_fingerprint == handle.base_fingerprint()
    served = copy.deepcopy(base).eval()
    served.load_state_dict(folded.extra, strict=False)
    for name, module in folded.modules.items():
        target = served.get_submodule(name)
        view = doran_core.layers.base_view(target)
        matrix = module.scale[:, None] * (view.weight().detach() + module.B @ module.A)
        with torch.no_grad():
            target.weight.copy_(view.stored(matrix))
    assert torch.allclose(served(TOKENS), trained, atol=1e-5)

    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    handle.merge(check_finite=True)
    assert torch.allclose(net(TOKENS), trained, atol=1e-5)
    assert handle.base_fingerprint() == folded.base_fingerprint
    handle.unmerge()
    assert torch.equal(net(TOKENS), trained)
    plain = handle.remove()
    assert plain is net
    for name, parameter in plain.named_parameters():
        if not name.startswith("head"):
            assert torch.equal(parameter, before[name]), name


def test_remove_merged_leaves_the_trained_function():
    net = Net()
    handle = adapt(net, config())
    train(handle)
    trained = net(TOKENS)
    assert torch.allclose(handle.remove(merged=True)(TOKENS), trained, atol=1e-5)
    assert not any(isinstance(module, DoranLinear) for module in net.modules())


def test_disabled_is_the_base_model():
    net = Net()
    base = copy.deepcopy(net)
    handle = adapt(net, config())
    train(handle)
    with handle.disabled():
        assert torch.equal(net(TOKENS), base(TOKENS))
    assert not torch.equal(net(TOKENS), base(TOKENS))


def test_only_adapters_and_saved_modules_are_trained():
    net = Net()
    handle = adapt(net, config(modules_to_save=["head"]))
    names = {name for name, _ in handle.named_parameters()}
    assert {"head.weight", "head.bias"} <= names
    assert all("doran_adapter" in name for name in names - {"head.weight", "head.bias"})
    assert set(handle.layers) == {f"blocks.{i}.{p}" for i in (0, 1) for p in ("q_proj", "v_proj")}
    assert set(handle.tau()) == set(handle.layers)


@pytest.mark.parametrize(
    ("targets", "options", "expected"),
    [
        ("all-linear", {}, 7),
        ("all-linear", {"modules_to_save": ["head"]}, 6),
        ("all-linear", {"exclude_modules": ["blocks.0.q_proj", "head"]}, 5),
        (r"blocks\.1\..*", {}, 3),
        (["blocks.0.out"], {}, 1),
        (["embed", "conv"], {}, 2),
    ],
)
def test_targets(targets, options, expected):
    assert len(find_targets(Net(), DoranConfig(target_modules=targets, **options))) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": None}, "expected name endings, a regex or 'all-linear'"),
        ({"target_modules": ["q_porj"]}, "'q_porj' matches no module; did you mean 'q_proj'"),
        ({"target_modules": ["xyz123"]}, "this model has adaptable modules ending in: conv, embed"),
        ({"target_modules": ["blocks"]}, r"only modules that DoRAN cannot adapt \(ModuleList\)"),
        ({"modules_to_save": ["classifier"]}, "'classifier' matches no module of this Net"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "leaves no module"),
    ],
)
def test_targets_that_do_not_fit_are_refused_and_the_model_is_untouched(options, message):
    net = Net()
    with pytest.raises(TargetError, match=message):
        adapt(net, config(**options))
    assert all(p.requires_grad for p in net.parameters())


def test_adapting_twice_is_refused():
    net = Net()
    adapt(net, config())
    with pytest.raises(TargetError, match="this Net is adapted already"):
        adapt(net, config())


def test_loading_what_does_not_fit_changes_nothing(tmp_path):
    handle = adapt(Net(), config())
    train(handle)
    handle.save(tmp_path / "a")
    other = Net()
    before = copy.deepcopy(other)
    with pytest.raises(BaseMismatchError, match=r"made for base weights sha256:.*this model has sha256:"):
        load(other, tmp_path / "a")
    assert torch.equal(other(TOKENS), before(TOKENS))
    load(other, tmp_path / "a", allow_base_mismatch=True)

    wider = adapt(Net(), config(rank=8))
    with pytest.raises((AdapterFormatError, BaseMismatchError)):
        wider.load(tmp_path / "a", allow_base_mismatch=True)
    fewer = adapt(Net(), config(target_modules=["q_proj"]))
    with pytest.raises(AdapterFormatError, match=r"adapts other modules: missing \[\], unknown \['blocks.0.v_proj'"):
        fewer.load(tmp_path / "a", allow_base_mismatch=True)
    handle.save(tmp_path / "c", form="folded")
    with pytest.raises(AdapterFormatError, match="expected a trainable DoRAN adapter"):
        load(Net(), tmp_path / "c")


class Reordered(Net):
    """The same model, its parts registered from last to first."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block._modules = dict(reversed(block._modules.items()))
        self._modules = dict(reversed(self._modules.items()))


@pytest.mark.parametrize(
    "options",
    [{}, {"sharing": "model"}, {"sharing": "model", "share_output": True}, {"rank_pattern": {"v_proj": 2}}],
    ids=str,
)
def test_modules_registered_in_another_order(tmp_path, options):
    net = Net()
    untouched = copy.deepcopy(net.state_dict())
    handle = adapt(net, config(target_modules=EVERYTHING, **options))
    train(handle)
    handle.save(tmp_path / "a")
    again = Reordered()
    again.load_state_dict(untouched)
    loaded = load(again, tmp_path / "a")
    assert list(loaded.layers) != list(handle.layers)
    assert torch.equal(again(TOKENS), net(TOKENS))
    loaded.save(tmp_path / "b")
    handle.load(tmp_path / "b")
    assert torch.equal(again(TOKENS), net(TOKENS))


def test_a_shared_part_that_is_there_twice_is_refused(tmp_path):
    record = adapt(Net(), config())._trainable(None)
    shared = {key: value for key, value in record.modules["blocks.0.q_proj"].items() if "trunk" in key}
    record.modules["blocks.0.v_proj"].update(shared)
    with pytest.raises(
        AdapterFormatError, match=r"blocks.0.v_proj: tensor 'factors.trunk.*blocks.0.q_proj brings, too"
    ):
        write_trainable(record, tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 3.0}, r"blocks.0.q_proj: scaling 4 in the file, 0.75 here"),
        ({"activation": "gelu"}, r"activation: file 'leaky_relu', here 'gelu'"),
        ({"tau_kind": "gaussian"}, r"tau_kind: file 'learned', here 'gaussian'"),
    ],
)
def test_loading_into_options_of_another_function_is_refused(tmp_path, options, words):
    adapt(Net(), config()).save(tmp_path / "a")
    with pytest.raises(AdapterFormatError, match=words):
        adapt(Net(), config(**options)).load(tmp_path / "a", allow_base_mismatch=True)


def test_saving_refuses_nan_and_other_forms_and_writes_nothing(tmp_path):
    handle = adapt(Net(), config())
    with pytest.raises(ConfigError, match="'onnx'"):
        handle.save(tmp_path / "a", form="onnx")
    with torch.no_grad():
        handle.layers["blocks.0.q_proj"].doran_adapter.magnitude[0] = torch.nan
    with pytest.raises(DoranError, match="magnitude"):
        handle.save(tmp_path / "a")
    with pytest.raises(DoranError, match=r"blocks\.0\.q_proj.*NaN"):
        handle.merge(check_finite=True)
    assert not any(layer.merged for layer in handle.layers.values())
    assert list(tmp_path.iterdir()) == []


def test_half_precision_base_and_its_fingerprint(tmp_path):
    single = adapt(Net(), config()).base_fingerprint()
    torch.manual_seed(1)
    net = Net()
    torch.manual_seed(1)
    bf16 = Net().bfloat16()
    assert adapt(net, config()).base_fingerprint() == adapt(bf16, config()).base_fingerprint() != single
    half = adapt(Net().half(), config())
    assert half.base_fingerprint() is None
    half.save(tmp_path / "h")
    saved = read_adapter(tmp_path / "h")
    assert isinstance(saved, TrainableAdapter)
    assert saved.base_fingerprint is None


def test_module_paths_of_before_are_still_importable():
    from doran_core import config, factors, tau
    from doran_core.checkpoint import Checkpoint
    from doran_core.checkpoint.checkpoint import Checkpoint as Home

    assert config.DoranConfig is DoranConfig
    assert factors.LayerSpec is doran_core.LayerSpec
    assert tau.Tau is doran_core.Tau
    assert Checkpoint is Home


@pytest.mark.parametrize("factors", ["generated", "static"])
def test_no_product_with_the_weight_at_the_start_nor_on_loading(factors, tmp_path):
    """A new adapter's B is 0, and of a saved one the magnitude is known: ``||W0||^2`` is all that is taken."""
    product = 2 * 512 * 256 * 2  # operations of W0 @ A.T
    made = [nn.Linear(256, 512) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    models = [nn.ModuleDict({"layer": layer}) for layer in made]
    with FlopCounterMode(display=False) as start:
        handle = adapt(models[0], DoranConfig(rank=2, target_modules=["layer"], factors=factors))
    handle.save(tmp_path / "a")
    with FlopCounterMode(display=False) as loading:
        load(models[1], tmp_path / "a")
    with FlopCounterMode(display=False) as forward:
        models[1]["layer"](torch.randn(1, 256))
    assert max(start.get_total_flops(), loading.get_total_flops()) < product / 2
    assert forward.get_total_flops() > product
