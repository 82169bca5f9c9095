"""Networks that layers share: they train, save, copy and load whichever of the layers is there."""

import copy
import pickle

import pytest
import torch
from torch import nn

from doran_core import DoranConfig, adapt, load
from doran_core.errors import AdapterFormatError
from doran_core.method.shared_network import shared_networks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.v(self.q(x))


def model(sharing="block", **options):
    torch.manual_seed(0)
    net = nn.Module()
    net.layers = nn.ModuleList(Block() for _ in range(2))
    handle = adapt(net, DoranConfig(rank=2, target_modules=["q", "v"], sharing=sharing, **options))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net, handle


def trunk_names(module):
    return [name for name, _ in module.named_parameters() if "trunk" in name]


@pytest.mark.parametrize("sharing", ["block", "model"])
def test_a_copy_of_any_layer_trains_all_that_it_uses(sharing):
    net, _ = model(sharing)
    twin = copy.deepcopy(net.layers[0].v)
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), net.layers[0].v(x))
    twin(x).square().sum().backward()
    grads = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert len([name for name in grads if "trunk" in name]) == 4
    assert all(grad is not None and bool(grad.any()) for grad in grads.values())
    assert all(p.grad is None for p in net.parameters())
    assert len(twin.state_dict()) > len(grads)


def test_an_owner_taken_out_leaves_the_networks_with_the_others():
    net, handle = model()
    values = {id(p) for name, p in net.named_parameters() if "layers.0" in name and "trunk" in name}
    assert len(values) == 4
    net.layers[0].q = handle.layers["layers.0.q"].base_layer
    assert {id(p) for name, p in net.named_parameters() if "layers.0.v" in name and "trunk" in name} == values
    assert {id(p) for p in handle.parameters()} >= values
    assert len([name for name in net.state_dict() if "layers.0.v" in name and "trunk" in name]) == 4


@pytest.mark.parametrize("sharing", ["block", "model"])
def test_a_state_dict_names_each_tensor_once_after_the_first_layer(sharing):
    net, _ = model(sharing)
    for _ in range(2):  # what the first call leaves behind must not change the second
        state = net.state_dict()
        assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
        assert {name for name in state if "trunk" in name} == set(trunk_names(net))
        assert all(".q." in name for name in state if "trunk" in name)
    assert "layers.0.v.doran_adapter.factors.trunk.A.embedding" not in state
    assert len(trunk_names(net.layers[0].v)) == len([n for n in net.layers[0].v.state_dict() if "trunk" in n]) == 4


def test_a_state_dict_loads_under_any_layers_name_and_is_strict():
    net, _ = model()
    state = net.state_dict()
    other = {
        name.replace(".q.doran_adapter.factors.trunk", ".v.doran_adapter.factors.trunk"): t for name, t in state.items()
    }
    assert other.keys() != state.keys()
    for given in (state, other):
        fresh, _ = model()
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        assert fresh.load_state_dict(given) == ([], [])
        assert all(torch.equal(t, state[name]) for name, t in fresh.state_dict().items())
    lacking = {name: t for name, t in state.items() if "layers.1" not in name or "trunk" not in name}
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"layers\.1\.q.*trunk\.A\.embedding"):
            model()[0].load_state_dict(lacking)
    half = {
        name: t for name, t in state.items() if not name.endswith("layers.1.q.doran_adapter.factors.trunk.B.embedding")
    }
    with pytest.raises(RuntimeError, match=r"layers\.1\.q\.doran_adapter\.factors\.trunk\.B\.embedding"):
        model()[0].load_state_dict(half)


def test_models_are_pickled_whole():
    net, _ = model()
    net.state_dict()
    again = pickle.loads(pickle.dumps(net))
    assert again.layers[0].q.doran_adapter.factors.trunk is again.layers[0].v.doran_adapter.factors.trunk
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in again.state_dict().items())


def test_saved_under_the_first_layer_whatever_the_models_order(tmp_path):
    net, handle = model("model")
    handle.save(tmp_path / "a")
    torch.manual_seed(0)
    turned = nn.Module()
    turned.layers = nn.ModuleList(Block() for _ in range(2))
    for block in turned.layers:
        block._modules = dict(reversed(block._modules.items()))
    load(turned, tmp_path / "a")
    x = torch.randn(3, 6)
    assert torch.equal(turned.layers[1](x), net.layers[1](x))


def test_a_group_whose_layers_were_copied_apart_is_not_saved(tmp_path):
    net, handle = model()
    handle.layers["layers.0.v"] = net.layers[0].v = copy.deepcopy(net.layers[0].v)
    with pytest.raises(AdapterFormatError, match="copied apart"):
        handle.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_which_modules_hold_a_network():
    net, _ = model("model")
    found = shared_networks(net)
    assert sorted(len(names) for names in found.values()) == [2, 2, 4]
    assert all(name.endswith("doran_adapter.factors") for names in found.values() for name in names)
