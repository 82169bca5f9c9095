"""DoranConfig: defaults, validation, LoRA's configurations, and what is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from doran_core import DoranConfig as CoreConfig
from doran_core.errors import ConfigError, DoranError
from doran_hf import DoranConfig, DoranModel, DoranPeftType, register


def test_every_option_of_the_core_is_there_with_its_default() -> None:
    ours = {entry.name: entry for entry in dataclasses.fields(DoranConfig)}
    assert {entry.name for entry in dataclasses.fields(CoreConfig)} <= set(ours)
    assert DoranConfig().core() == CoreConfig()
    assert all(entry.metadata.get("help") for name, entry in ours.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank.*0"),
        ({"rank": "8"}, r"rank.*'8'"),
        ({"tau_kind": "learnt"}, r"tau_kind.*'learnt'"),
        ({"dropout": 1.5}, r"dropout.*1\.5"),
        ({"bias": "lora_only"}, r"bias.*'lora_only'"),
        ({"target_modules": 3}, r"target_modules.*3"),
        ({"target_modules": []}, r"target_modules.*\[\]"),
        ({"target_modules": ["a", 3]}, r"target_modules.*3"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern.*regular expression"),
        ({"target_modules": r".*q", "layers_to_transform": [1]}, r"layers_to_transform"),
        ({"layers_pattern": "layers"}, r"layers_pattern"),
        ({"format_version": 99}, r"99"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        DoranConfig(**options)
    assert isinstance(error.value, DoranError)


def test_saved_configuration_comes_back(tmp_path: Path) -> None:
    config = DoranConfig(
        rank=3, target_modules=["b", "a"], rank_pattern={"a": 2}, tau_kind="fixed", task_type="CAUSAL_LM"
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DoranConfig)
    assert loaded == config
    assert config.to_dict()["target_modules"] == ["a", "b"]


def test_from_lora_keeps_what_it_adapts_and_how_strongly() -> None:
    lora = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=["q_proj", "k_proj"],
        use_rslora=True,
        use_dora=True,
        bias="lora_only",
        rank_pattern={"k_proj": 2},
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    config = DoranConfig.from_lora(lora, tau_kind="fixed")
    assert (config.rank, config.alpha, config.dropout, config.use_rslora) == (4, 6, 0.1, True)
    assert config.target_modules == {"q_proj", "k_proj"}
    assert (config.bias, config.tau_kind, config.task_type) == ("doran_only", "fixed", "SEQ_CLS")
    assert (config.rank_pattern, config.modules_to_save) == ({"k_proj": 2}, ["score"])
    assert DoranConfig.from_lora(LoraConfig()).alpha == 8


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"lora_bias": True}], ids=str)
def test_from_lora_refuses_what_it_would_lose(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        DoranConfig.from_lora(LoraConfig(**options))


def test_registration_is_idempotent_and_refuses_a_taken_name() -> None:
    register(DoranConfig, DoranModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["DORAN"] is DoranConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[DoranPeftType.DORAN] is DoranModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["DORAN"] == "doran_"
    with pytest.raises(DoranError, match="DORAN"):
        register(LoraConfig, DoranModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["DORAN"] is DoranConfig
