"""Which modules an adapter goes to, and what is said when it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MAKERS, disturb, logits, make_bert, make_llama
from peft import get_peft_model
from torch import nn

from doran_core.errors import TargetError
from doran_hf import DoranConfig
from doran_hf.layer import doran_layers

ATTENTION = {f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"}
MLP = {f"model.layers.{i}.mlp.{p}_proj" for i in range(3) for p in ("gate", "up", "down")}


def adapted(**options: Any) -> set[str]:
    return {layer.name for layer in doran_layers(get_peft_model(make_llama(), DoranConfig(**options)))}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, ATTENTION | MLP),
        ({"target_modules": "ALL-LINEAR"}, ATTENTION | MLP),
        ({"target_modules": ["q_proj"]}, {name for name in ATTENTION if name.endswith("q_proj")}),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, {"model.layers.1.mlp.up_proj"}),
        ({"target_modules": r".*\.1\.self_attn\.(q|o)_proj"}, {f"model.layers.1.self_attn.{p}_proj" for p in "qo"}),
        ({"target_modules": "all-linear", "exclude_modules": ["gate_proj", "up_proj", "down_proj"]}, ATTENTION),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, ATTENTION),
        (
            {"target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
            {f"model.layers.{i}.self_attn.o_proj" for i in (0, 2)},
        ),
        (
            {"target_modules": ["o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
            {"model.layers.1.self_attn.o_proj"},
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # a set prints in another order in each process
)
def test_target_forms(options: dict[str, Any], expected: set[str]) -> None:
    assert adapted(**options) == expected


@pytest.mark.parametrize(
    ("family", "endings"),
    [
        ("llama", {"q_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("bert", {"query", "value"}),
        ("vit", {"q_proj", "v_proj"}),
    ],
)
def test_defaults_are_query_and_value(family: str, endings: set[str]) -> None:
    model = get_peft_model(MAKERS[family](), DoranConfig())
    assert {layer.name.rpartition(".")[2] for layer in doran_layers(model)} == endings
    assert model.peft_config["default"].target_modules == endings


def test_all_linear_leaves_a_classifier_alone() -> None:
    model = get_peft_model(make_bert(), DoranConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert not any("classifier" in layer.name for layer in doran_layers(model))


def test_all_linear_for_a_second_adapter_finds_the_same_layers() -> None:
    model = get_peft_model(make_llama(), DoranConfig(target_modules="all-linear"))
    model.add_adapter("second", DoranConfig(target_modules="all-linear"))
    assert {layer.name for layer in doran_layers(model, "second")} == ATTENTION | MLP


def test_patterns_set_rank_and_scaling() -> None:
    config = DoranConfig(
        rank=4, alpha=8.0, rank_pattern={"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 6}, alpha_pattern={"v_proj": 3}
    )
    layers = {layer.name: layer.adapter("default") for layer in doran_layers(get_peft_model(make_llama(), config))}
    ranks = {name: adapter.factor_pair()[0].shape[0] for name, adapter in layers.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert ranks["model.layers.1.self_attn.q_proj"] == 6
    assert ranks["model.layers.1.self_attn.v_proj"] == 2
    assert layers["model.layers.1.self_attn.v_proj"].scaling == 1.5
    assert layers["model.layers.1.self_attn.q_proj"].scaling == pytest.approx(8 / 6)


@pytest.mark.parametrize("targets", [["v_porj"], ["q_proj", "v_porj"], r".*\.v_porj"], ids=str)
def test_unknown_targets_name_the_nearest_and_change_nothing(targets: Any) -> None:
    model = make_llama()
    with pytest.raises(TargetError, match="v_proj") as error:
        get_peft_model(model, DoranConfig(target_modules=targets))
    assert "v_porj" in str(error.value)
    assert not list(doran_layers(model))


def test_unknown_family_says_what_could_be_named() -> None:
    class Plain(nn.Sequential):
        pass

    model = Plain(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TargetError, match="target_modules"):
        get_peft_model(model, DoranConfig())
    expected = model(torch.ones(2, 3))
    wrapped = get_peft_model(model, DoranConfig(target_modules=["0", "2"], rank=2))
    torch.testing.assert_close(wrapped(torch.ones(2, 3)), expected)


def test_a_module_of_another_kind_is_refused() -> None:
    with pytest.raises(TargetError, match=r"model\.norm.*LlamaRMSNorm"):
        get_peft_model(make_llama(), DoranConfig(target_modules=["model.norm"]))


def test_convolutions_are_adapted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    wrapped = get_peft_model(model, DoranConfig(target_modules=["0", "3"], rank=2))
    torch.testing.assert_close(wrapped(x), expected)
    disturb(wrapped)
    adapted_output = wrapped(x)
    assert (adapted_output - expected).abs().max() > 1e-3
    torch.testing.assert_close(wrapped.merge_and_unload()(x), adapted_output, atol=1e-5, rtol=1e-4)


def test_logits_do_not_depend_on_the_order_of_names() -> None:
    models = []
    for targets in (["q_proj", "v_proj"], ["v_proj", "q_proj"]):
        torch.manual_seed(3)
        models.append(get_peft_model(make_llama(), DoranConfig(target_modules=targets)))
        disturb(models[-1])
    assert torch.equal(logits(models[0]), logits(models[1]))
