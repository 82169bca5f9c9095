"""PEFT's tests of several adapters at once, of what trains and of full copies of modules, for DORAN."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import CUSTOM, MLP, DeepMLP, stir
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from doran_core.errors import DoranError
from doran_hf import DoranConfig
from doran_hf.layer import doran_layers

PAIRS = {
    "same layer": ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    "same layer, other rank": ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "rank": 3}),
    "other layers": ({"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    "overlapping": ({"target_modules": ["lin0", "lin1"]}, {"target_modules": ["lin1"], "factors": "static"}),
    "other methods": ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "tau_kind": "zero", "experts": True}),
}
every_pair = pytest.mark.parametrize(("one", "two"), PAIRS.values(), ids=PAIRS)
CASE = CUSTOM["MLP one layer"]


def deep() -> DeepMLP:
    torch.manual_seed(0)
    return DeepMLP()


def pair(one: dict[str, object], two: dict[str, object]) -> PeftModel:
    model = get_peft_model(CASE.base(), DoranConfig(**one), adapter_name="one")
    model.add_adapter("two", DoranConfig(**two))
    stir(model, "one")
    stir(model, "two", seed=8)
    return model.eval()


def trains(module: nn.Module, adapter_name: str) -> set[bool]:
    return {p.requires_grad for n, p in module.named_parameters() if f".{adapter_name}." in f".{n}"}


@every_pair
def test_both_active(one: dict[str, object], two: dict[str, object]) -> None:
    """test_multiple_active_adapters_forward: layer by layer the changes of both add up, in either order."""
    model = pair(one, two)
    model.base_model.set_adapter(["one", "two"])
    both = CASE.output(model)
    model.base_model.set_adapter(["two", "one"])
    torch.testing.assert_close(CASE.output(model), both)
    for name in ("one", "two"):
        model.set_adapter(name)
        assert not torch.allclose(CASE.output(model), both, atol=1e-4)


@every_pair
def test_merging_both_together_or_one_after_the_other(one: dict[str, object], two: dict[str, object]) -> None:
    """test_multiple_active_adapters_merge_and_unmerge, test_sequential_merge_*, test_unmerge_after_*."""
    model = pair(one, two)
    weights = copy.deepcopy(model.state_dict())
    model.base_model.set_adapter(["one", "two"])
    both = CASE.output(model)
    model.merge_adapter(["one", "two"])
    together = CASE.output(model)
    torch.testing.assert_close(together, both, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(CASE.output(model), both)
    model.merge_adapter(["one"])
    model.merge_adapter(["two"])
    torch.testing.assert_close(CASE.output(model), together, atol=1e-6, rtol=1e-6)
    model.unmerge_adapter()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_deleting_the_merged_one_only_is_refused() -> None:
    """test_delete_merged_adapter_only_rejects_the_merged_one."""
    model = pair(*PAIRS["same layer"])
    model.set_adapter("two")
    model.merge_adapter()
    with pytest.raises(ValueError, match="two"):
        model.delete_adapter("two")
    model.delete_adapter("one")
    assert set(model.peft_config) == {"two"}
    assert all(layer.merged for layer in doran_layers(model))
    model.unmerge_adapter()


def test_a_name_that_is_taken_is_refused_without_a_trace() -> None:
    """test_add_adapter_rejects_duplicate_name_without_mutation."""
    model = get_peft_model(CASE.base(), DoranConfig(target_modules=["lin0"]), adapter_name="mine")
    config, state = model.peft_config["mine"], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'mine' already exists"):
        model.add_adapter("mine", DoranConfig(target_modules=["lin0"], rank=2))
    assert model.peft_config["mine"] is config
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_biases_are_for_one_adapter() -> None:
    """_test_adding_multiple_adapters_with_bias_raises, test_disable_adapter_with_bias_warns."""
    model = get_peft_model(CASE.base(), DoranConfig(target_modules=["lin0"], bias="all"), adapter_name="one")
    with pytest.raises(ValueError, match="bias"):
        model.add_adapter("two", DoranConfig(target_modules=["lin0"], bias="all", rank=3))
    assert "two" not in model.peft_config
    assert "two" not in model.base_model.peft_config
    with pytest.warns(UserWarning, match="bias"), model.disable_adapter():
        pass


def test_layers_of_single_adapters_follow_the_active_one() -> None:
    """test_set_adapter_non_overlapping_modules, test_active_adapter."""
    model = get_peft_model(deep(), DoranConfig(target_modules=["layers.0.lin0"]), adapter_name="one")
    model.add_adapter("two", DoranConfig(target_modules=["layers.1.lin0"]))
    for name, other in (("one", "two"), ("two", "one")):
        model.set_adapter(name)
        assert model.active_adapter == name
        assert trains(model, name) == {True}
        assert trains(model, other) == {False}
    model.base_model.set_adapter(["one", "two"])
    assert trains(model, "one") == trains(model, "two") == {True}


def test_turning_gradients_on_and_off_by_name() -> None:
    """test_set_requires_grad."""
    model = get_peft_model(deep(), DoranConfig(target_modules=["layers.0.lin0"]), adapter_name="one")
    model.add_adapter(
        "two",
        DoranConfig(target_modules=["lin0"], exclude_modules=["layers.2.lin0"], modules_to_save=["layers.2.lin1"]),
    )
    assert (trains(model, "one"), trains(model, "two")) == ({True}, {False})
    model.set_requires_grad("two")
    assert trains(model, "one") == trains(model, "two") == {True}
    model.set_requires_grad(["one", "two"], requires_grad=False)
    assert trains(model, "one") == trains(model, "two") == {False}


@pytest.mark.parametrize("is_trainable", [True, False])
def test_loaded_adapters_train_as_loras_do(is_trainable: bool, tmp_path: Path) -> None:
    """test_loading_model_requires_grad_set_correctly and its relatives, with modules_to_save."""
    found = []
    for config in (LoraConfig, DoranConfig):
        folder, seen = tmp_path / config.__name__, []
        options = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
        get_peft_model(CASE.base(), config(**options)).save_pretrained(folder)
        model = PeftModel.from_pretrained(CASE.base(), folder, is_trainable=is_trainable)
        seen.append(trains(model, "default"))
        model.load_adapter(folder, adapter_name="second", is_trainable=is_trainable)
        seen += [trains(model, "default"), trains(model, "second")]
        model.set_adapter("second", inference_mode=not is_trainable)
        seen += [trains(model, "default"), trains(model, "second")]
        found.append(seen)
    assert found[0] == found[1]
    assert found[1][0] == {is_trainable}
    assert found[1][3:] == [{False}, {is_trainable}]


def test_full_copies_of_modules() -> None:
    """test_multiple_adapters_*_modules_to_save, test_requires_grad_modules_to_save_*, *_no_needless_copy_*."""
    model = get_peft_model(CASE.base(), DoranConfig(target_modules=["lin0"], modules_to_save=["lin1"]), "one")
    model.add_adapter("two", DoranConfig(target_modules=["lin0"]))
    model.add_adapter("three", DoranConfig(target_modules=["lin0"], modules_to_save=["lin1"]))
    wrapper = model.base_model.model.lin1
    assert isinstance(wrapper, ModulesToSaveWrapper)
    assert set(wrapper.modules_to_save) == {"one", "three"}
    with torch.no_grad():
        wrapper.modules_to_save["three"].weight[0].add_(1.0)
    outputs = {}
    for name in ("one", "two", "three"):
        model.set_adapter(name)
        outputs[name] = CASE.output(model)
    base = CASE.output(CASE.base())
    assert torch.allclose(outputs["one"], base)
    assert torch.allclose(outputs["two"], base)
    assert not torch.allclose(outputs["three"], base, atol=1e-3)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
        model.base_model.set_adapter(["one", "three"])
    model.set_adapter("three")
    model.delete_adapter("one")
    assert torch.equal(CASE.output(model), outputs["three"])
    torch.testing.assert_close(CASE.output(model.merge_and_unload()), outputs["three"])


def test_three_adapters_deleted_one_by_one() -> None:
    """test_delete_adapter_with_multiple_adapters_works, test_multirank."""
    model = get_peft_model(MLP(), DoranConfig(target_modules=["lin0"], rank_pattern={"lin0": 3}), "zero")
    model.add_adapter("one", DoranConfig(target_modules=["lin0"]))
    model.add_adapter("two", DoranConfig(target_modules=["lin0", "lin1"]))
    with pytest.warns(UserWarning, match="was active"):
        model.delete_adapter("zero")
    assert model.active_adapters == ["one"]
    model.delete_adapter("two")
    assert model.active_adapters == ["one"]
    CASE.output(model)


@pytest.mark.parametrize("targets", [["nothing"], ["lin0", "lni1"], r".*nothing"])
def test_targets_that_are_not_there(targets: list[str] | str) -> None:
    """test_default_target_modules_not_set_raises and relatives; the nearest names are in the message."""
    with pytest.raises(DoranError, match="lin"):
        get_peft_model(MLP(), DoranConfig(target_modules=targets))
    with pytest.raises(DoranError, match="target_modules"):
        get_peft_model(MLP(), DoranConfig())
