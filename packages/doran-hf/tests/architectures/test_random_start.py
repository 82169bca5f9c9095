"""Poolers and heads that a base does not have: named, or trained in full and saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import ENCODERS, FAMILIES
from peft import PeftModel, get_peft_model
from test_architectures import load, outputs
from tiny import text

from doran_hf import DoranConfig
from doran_hf.random_start import random_parameters

CLASSIFIERS = {
    "bert": (tf.BertForSequenceClassification, ["bert.pooler", "classifier"]),
    "deberta": (tf.DebertaForSequenceClassification, ["pooler", "classifier"]),
    "deberta_v2": (tf.DebertaV2ForSequenceClassification, ["pooler", "classifier"]),
    "xlnet": (tf.XLNetForSequenceClassification, ["sequence_summary", "logits_proj"]),
    "roberta": (tf.RobertaForSequenceClassification, ["classifier"]),
}


def classifier(family: str, folder: Path, seed: int) -> Any:
    """A classifier on a base that was trained for something else."""
    if not folder.exists():
        ENCODERS[family].make().save_pretrained(folder)
    torch.manual_seed(seed)
    return CLASSIFIERS[family][0].from_pretrained(folder, num_labels=3, pad_token_id=0, dtype=torch.float32)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_what_the_checkpoint_lacks_is_named(family: str, tmp_path: Path) -> None:
    lacking = CLASSIFIERS[family][1]
    with pytest.warns(UserWarning, match=f"lacks {', '.join(lacking)}: .*at random.*modules_to_save=") as said:
        get_peft_model(classifier(family, tmp_path / "base", 0), DoranConfig(target_modules="all-linear"))
    assert str(lacking) in str(said[0].message)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_saved_as_advised_every_seed_gives_the_same(family: str, tmp_path: Path) -> None:
    config = DoranConfig(target_modules="all-linear", modules_to_save=CLASSIFIERS[family][1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the checkpoint of this")
        model = get_peft_model(classifier(family, tmp_path / "base", 0), config)
        expected = outputs(model, text())[0]
        model.save_pretrained(tmp_path / "adapter")
        for seed in (1, 2):
            loaded = PeftModel.from_pretrained(classifier(family, tmp_path / "base", seed), tmp_path / "adapter")
            assert torch.equal(outputs(loaded, text())[0], expected)


def test_a_layer_put_in_after_loading_is_named(tmp_path: Path) -> None:
    FAMILIES["llama"].make().save_pretrained(tmp_path)
    model = load(FAMILIES["llama"], tmp_path)
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.warns(UserWarning, match=r"lacks model\.layers\.1\.mlp\.up_proj: "):
        get_peft_model(model, DoranConfig())


def test_a_model_that_was_not_loaded_says_nothing() -> None:
    assert random_parameters(FAMILIES["bert"].make()) == []
