"""`doran train` for classes of texts and of images: heads, labels, and the model card's code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_bert
from peft import PeftModel
from PIL import Image
from runs import ROWS, run, settings, write_rows
from tiny_bases import make_tokenizer, save_image_base, save_text_base
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, ViTForImageClassification

from doran_core.errors import ConfigError
from doran_hf.train import load_config

pytestmark = pytest.mark.usefixtures("in_folder")

NO_COMPLETION = dict.fromkeys(("data__prompt", "data__completion", "data__choices", "data__append_eos"), "unset")
"""Leaves out of `runs.settings` the fields that only causal language models have."""


def test_sequence_classification_with_names_as_labels() -> None:
    metrics = run(
        base=str(save_text_base(Path("bert"), "bert")),
        task="sequence-classification",
        **NO_COMPLETION,
        data__label="sentiment",
        adapter__target_modules="all-linear",
        trainer__max_steps=60,
    )
    assert metrics["adapter"]["accuracy"] > 0.95
    assert metrics["adapter"]["macro_f1"] > 0.95
    assert metrics["held_out"] == {"examples": len(ROWS[::5]), "cut": 0, "left_out": 0}
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert "classifier" in config["modules_to_save"]
    base = AutoModelForSequenceClassification.from_pretrained("bert", num_labels=2, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, "run/adapter").eval()
    rows = ROWS[::5]
    ids = make_tokenizer()([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        found = [["negative", "positive"][int(index)] for index in model(**ids).logits.argmax(-1)]
    right = sum(name == row["sentiment"] for name, row in zip(found, rows, strict=True))
    assert right / len(rows) == metrics["adapter"]["accuracy"]


def test_a_pooler_that_the_base_lacks_is_trained_and_saved(capsys: pytest.CaptureFixture[str]) -> None:
    """On a masked language model, BERT's pooler starts at random: left out, each loading would draw another one."""
    base = Path("masked")
    torch.manual_seed(0)
    BertForMaskedLM(make_bert().config).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    metrics = run(
        base=str(base),
        task="sequence-classification",
        **NO_COMPLETION,
        data__label="sentiment",
        trainer__max_steps=40,
    )
    assert "in full     bert.pooler, classifier" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("test.jsonl").read_text().splitlines()]
    tokens = make_tokenizer()([row["text"] for row in rows], padding=True, return_tensors="pt")
    answers = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        with torch.no_grad():
            answers.append(PeftModel.from_pretrained(model, "run/adapter").eval()(**tokens).logits)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    names = json.loads(Path("run/adapter/labels.json").read_text())
    right = sum(names[index] == row["sentiment"] for index, row in zip(answers[0].argmax(-1), rows, strict=True))
    assert right / len(rows) == metrics["adapter"]["accuracy"]


def test_image_classification_of_a_folder() -> None:
    for index in range(24):
        name = ("dark", "light")[index % 2]
        folder = Path(f"images/{'train' if index < 16 else 'test'}/{name}")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.full((8, 8), 40 if name == "dark" else 210, dtype=torch.uint8)
        pixels[index % 8] = 100
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    metrics = run(
        base=str(save_image_base(Path("vit"))),
        task="image-classification",
        data__train="images",
        data__eval="images",
        **NO_COMPLETION,
    )
    assert metrics["training"]["examples"] == 16
    assert metrics["adapter"]["accuracy"] == 1.0
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    base = ViTForImageClassification.from_pretrained("vit", num_labels=2, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, "run/adapter")
    light = torch.full((1, 1, 8, 8), 210 / 255 * 2 - 1)
    with torch.no_grad():
        assert model.eval()(pixel_values=light).logits.argmax() == 1


def _three_classes(**changes: Any) -> dict[str, Any]:
    rows = [
        {"text": f"{letter} {number}", "topic": "xyz"["abcdef".index(letter) // 2]}
        for number in range(8)
        for letter in "abcdef"
    ]
    values = {
        "task": "sequence-classification",
        "data__train": write_rows("topics.jsonl", rows),
        "data__eval": write_rows("topics-test.jsonl", rows[::5]),
        "data__label": "topic",
        "adapter__target_modules": "all-linear",
        "trainer__max_steps": 60,
    }
    return NO_COMPLETION | values | changes


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_cards_code_loads_a_classifier_of_three_classes(family: str) -> None:
    if family == "llama":
        from conftest import make_llama

        model = make_llama()
        model.config.pad_token_id = None
        model.save_pretrained("decoder")
        make_tokenizer().save_pretrained("decoder")
        base = "decoder"
    else:
        base = str(save_text_base(Path("bert"), "bert"))
    metrics = run(base=base, **_three_classes())
    assert metrics["adapter"]["accuracy"] > 0.9
    assert json.loads(Path("run/adapter/labels.json").read_text()) == ["x", "y", "z"]
    code = re.search(r"```python\n(.*?)```", Path("run/adapter/README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace("this-directory", "run/adapter"), names)
    model = names["model"].eval()
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    rows = [json.loads(line) for line in Path("topics-test.jsonl").read_text().splitlines()]
    batch = make_tokenizer()([row["text"] for row in rows], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        found = [names["names"][int(index)] for index in model(**batch).logits.argmax(-1)]
    right = sum(name == row["topic"] for name, row in zip(found, rows, strict=True))
    assert right / len(rows) == metrics["adapter"]["accuracy"]


def test_the_users_modules_to_save_do_not_displace_the_head() -> None:
    from doran_hf.train.classification import ImageClassification

    model = ViTForImageClassification.from_pretrained(save_image_base(Path("vit")))
    for wanted, expected in (
        (None, ["classifier"]),
        (["layernorm"], ["layernorm", "classifier"]),
        (["classifier"], ["classifier"]),
    ):
        recipe = object.__new__(ImageClassification)
        config = settings(task="image-classification", adapter__modules_to_save=wanted)
        for name in ("data.prompt", "data.completion", "data.choices", "data.append_eos"):
            del config[name]
        recipe.config = load_config(None, config)
        assert recipe.trained_in_full(model) == expected


def test_labels_that_are_one_or_have_gaps(capsys: pytest.CaptureFixture[str]) -> None:
    base = str(save_text_base(Path("bert"), "bert"))
    one = write_rows("one.jsonl", [{"text": "a", "topic": "x"}] * 4)
    with pytest.raises(ConfigError, match=r"data.label: every example has the label 'x'"):
        run(base=base, **_three_classes(data__train=one))
    gaps = write_rows("gaps.jsonl", [{"text": "a", "topic": index % 2 * 3} for index in range(8)])
    run(base=base, **_three_classes(data__train=gaps, data__eval="unset", trainer__max_steps=1))
    assert re.search(r"classes +4, 2 of them without an example to train on: '1', '2'\n", capsys.readouterr().out)
