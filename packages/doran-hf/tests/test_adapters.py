"""Several adapters in one model: adding, switching, combining, disabling, deleting."""

from __future__ import annotations

import pytest
import torch
from conftest import disturb, logits, make_llama
from peft import PeftModel, get_peft_model

from doran_core.errors import ConfigError
from doran_hf import DoranConfig
from doran_hf.layer import DoranLayer, doran_layers


def two_adapters() -> PeftModel:
    """ "default" on query and value, "second" on all linear layers with other options; "default" is active."""
    model = get_peft_model(make_llama(), DoranConfig())
    disturb(model, "default")
    model.add_adapter("second", DoranConfig(rank=3, target_modules="all-linear", factors="static", tau_kind="zero"))
    return model


def trainable(model: PeftModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_second_adapter_changes_nothing_until_it_is_active() -> None:
    base = logits(make_llama())
    model = two_adapters()
    first = logits(model)
    model.set_adapter("second")
    assert (logits(model) - base).abs().max() < 1e-5
    disturb(model, "second")
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)


def test_only_the_active_adapter_trains() -> None:
    model = two_adapters()
    assert {name.split(".doran_adapter.")[1].split(".")[0] for name in trainable(model)} == {"default"}
    model.set_adapter("second")
    assert {name.split(".doran_adapter.")[1].split(".")[0] for name in trainable(model)} == {"second"}


def test_the_first_layer_of_each_block_owns_the_shared_parameters_once() -> None:
    model = get_peft_model(make_llama(), DoranConfig(target_modules=["q_proj", "v_proj"]))
    trunks = [name for name in model.state_dict() if ".trunk." in name]
    assert trunks
    assert all(".q_proj." in name for name in trunks)
    assert {name for name, _ in model.named_parameters() if ".trunk." in name} == set(trunks)


def test_disabling_gives_the_base_model_back_to_the_bit() -> None:
    base = logits(make_llama())
    model = two_adapters()
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_deleting_leaves_the_other_one() -> None:
    model = two_adapters()
    disturb(model, "second")
    model.set_adapter("second")
    second = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any(".default." in name for name in model.state_dict())
    assert model.active_adapters == ["second"]


def test_deleting_the_active_adapter_falls_back_to_the_other() -> None:
    model = two_adapters()
    disturb(model, "second")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]


def test_one_pass_looks_at_the_base_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = next(doran_layers(get_peft_model(make_llama(), DoranConfig(rank=4))))
    view, looks = type(layer).view, []
    monkeypatch.setattr(DoranLayer, "view", property(lambda self: (looks.append(self), view.fget(self))[1]))
    layer(torch.randn(2, layer.in_features))
    assert looks == [layer]


def test_active_together_the_changes_of_each_layer_add_up() -> None:
    model = two_adapters()
    disturb(model, "second")
    layer = next(iter(doran_layers(model, "default")))
    x = torch.randn(2, 5, 32)
    base = layer.base_layer(x)
    single = []
    for name in ("default", "second"):
        layer.set_adapter(name)
        single.append(layer(x) - base)
    layer.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), base + single[0] + single[1])
    together = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), together, atol=1e-5, rtol=1e-5)


def test_adding_while_merged_starts_from_the_base_weight() -> None:
    base = logits(make_llama())
    model = get_peft_model(make_llama(), DoranConfig())
    disturb(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="[Uu]nmerging"):
        model.add_adapter("second", DoranConfig())
    model.set_adapter("second")
    assert (logits(model) - base).abs().max() < 1e-5
    disturb(model, "second")
    adapted = logits(model)
    model.merge_adapter()  # the merge takes its norm from the weight, the forward pass from what the start remembered
    assert (logits(model) - adapted).abs().max() < 1e-4


def test_loading_other_base_weights_in_place_is_noticed() -> None:
    model = get_peft_model(make_llama(), DoranConfig())
    other = make_llama(seed=3)
    model.load_state_dict(get_peft_model(other, DoranConfig()).state_dict())
    assert (logits(model) - logits(make_llama(seed=3))).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["tau", "magnitude", "factors"])
def test_adapter_names_that_are_parts_of_keys_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        get_peft_model(make_llama(), DoranConfig(), adapter_name=name)
