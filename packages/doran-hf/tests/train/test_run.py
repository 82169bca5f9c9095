"""`doran train` from files to an adapter, on tiny models: a whole run, its output directory, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from PIL import Image
from runs import ROWS, as_flags, run, settings, write_rows
from tiny_bases import make_tokenizer

from doran_core.cli.main import main
from doran_core.errors import CheckpointError, ConfigError, DoranError
from doran_hf.layer_table import read_states
from doran_hf.train import load_config, train

pytestmark = pytest.mark.usefixtures("in_folder")

CLASSIFY = {
    "data__prompt": None,
    "data__completion": None,
    "data__choices": None,
    "data__label": "sentiment",
}


def test_causal_lm_learns_and_leaves_all_that_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run()
    assert metrics["adapter"]["accuracy"] > max(0.95, metrics["base"]["accuracy"])
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"]
    assert json.loads(Path("run/metrics.json").read_text()) == metrics
    names = {"adapter", "base.json", "config.yaml", "layers.parquet", "metrics.json"}
    assert {path.name for path in Path("run").iterdir()} == names
    printed = capsys.readouterr().out
    assert "learned: 'positive'" in printed or "learned: 'negative'" in printed
    assert "30 of 8 examples" in printed

    states = read_states("run/layers.parquet")
    assert sorted({row.step for row in states}) == [0, 5, 10, 15, 20, 25, 30]
    assert {row.layer for row in states} == set(metrics["tau"])
    last = {row.layer: row.tau for row in states if row.step == 30}
    assert last == pytest.approx(metrics["tau"])

    card = Path("run/adapter/README.md").read_text()
    assert "import doran_hf" in card
    assert f"| accuracy | {metrics['base']['accuracy']:.4f} | {metrics['adapter']['accuracy']:.4f} |" in card
    model = AutoPeftModelForCausalLM.from_pretrained("run/adapter").eval()
    tokenizer = make_tokenizer()
    right = 0
    for row in ROWS[::5]:
        ids = tokenizer(f"Review: {row['text']} Sentiment:", return_tensors="pt").input_ids
        with torch.no_grad():
            right += tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == row["sentiment"]
    assert right == round(metrics["adapter"]["accuracy"] * len(ROWS[::5]))

    assert main(["plot", "run"]) == 0
    assert Image.open("run/layers.png").size[0] > 300


def test_cut_and_left_out_examples_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": " ".join("abcdefgh"[:words]), "sentiment": "positive"} for words in (2, 4, 5, 6, 8)]
    write_rows("long.jsonl", rows)
    whole = len(make_tokenizer()("Review: a b c d e Sentiment: positive a").input_ids)  # with five words
    metrics = run(
        data__train="long.jsonl",
        data__eval="long.jsonl",
        data__completion=" {sentiment} a",  # with six words its last token is cut off, with eight all of it
        data__choices="unset",
        data__max_length=whole,
        trainer__max_steps=1,
    )
    assert metrics["held_out"] == {"examples": 4, "cut": 1, "left_out": 1}
    assert [metrics["training"][name] for name in ("examples", "cut", "left_out")] == [4, 1, 1]
    assert capsys.readouterr().out.count("4 examples, 1 of them cut, 1 left out with nothing to learn") == 2
    card = Path("run/adapter/README.md").read_text()
    assert "Of 5 examples 1 were cut to the longest length, and 1 were left out of" in card


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    flags = as_flags(settings())
    before = sorted(Path().iterdir())
    assert main(["train", *flags, "--dry-run"]) == 0
    assert "30 of 8 examples" in capsys.readouterr().out
    assert main(["train", *flags, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": "run", "dry_run": True}
    assert sorted(Path().iterdir()) == before


def test_a_run_that_is_done_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    flags = as_flags(settings(trainer__max_steps=2))
    assert main(["train", *flags, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)  # all else goes to standard error
    assert first == {"output": "run", "dry_run": False, **json.loads(Path("run/metrics.json").read_text())}
    before = Path("run/metrics.json").stat().st_mtime_ns
    assert main(["train", *flags]) == 0
    printed = capsys.readouterr().out
    assert "run is done; --overwrite trains again" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert rows["accuracy"] == [f"{first[who]['accuracy']:.4g}" for who in ("base", "adapter")]
    assert Path("run/metrics.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"trainer.max_steps was 2, now 3"):
        run(trainer__max_steps=3)
    train(load_config(None, settings(trainer__max_steps=3)), overwrite=True)
    assert json.loads(Path("run/metrics.json").read_text())["training"]["steps"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base": "nowhere"},
            r"base: there is no directory 'nowhere', and no model of that name is in the hub",
        ),
        ({"base": "./nowhere"}, r"base: there is no directory './nowhere', and it is not a name that a model"),
        ({"data__train": "nowhere.jsonl"}, r"data.train: 'nowhere.jsonl' does not exist"),
        ({"data__eval": "base"}, r"data.eval: .*imagefolder"),
        ({"data__train": "odd.xyz"}, r"data.train: cannot tell the format of 'odd.xyz'"),
        ({"data__train": "broken.jsonl"}, r"data.train: cannot read 'broken.jsonl' as json"),
        ({"data__completion": " {mood}"}, r"data.completion: .*'mood'.*'sentiment', 'text'"),
        ({"data__choices": [" yes", " no"]}, r"data.choices: the completion ' .*tive' of an example is not among"),
        ({"data__max_length": 2}, r"data.train: nothing to learn is left of 48 examples cut to 2 tokens"),
        ({"adapter__target_modules": ["q_prj"]}, r"'q_prj' matches no module .*q_proj"),
        ({"trainer__eval_strategy": "sometimes"}, r"trainer: .*sometimes"),
        ({"trainer__eval_strategy": "steps", "data__eval": None}, r"trainer: .*eval"),
        ({"trainer__report_to": "wandb"}, r"trainer: .*wandb"),
        (
            {"data__max_length": 5, "data__choices": [" positive", " negative", " a b"]},
            r"data.max_length: an example has 6 tokens with the choice ' a b', and only 5 are kept",
        ),
        ({"task": "sequence-classification", **CLASSIFY, "data__text": "txt"}, r"data.text: 'txt' is no column"),
        ({"task": "sequence-classification", **CLASSIFY, "data__text_pair": "b"}, r"data.text_pair: 'b' is no column"),
        ({"output": "base"}, r"output: base is not empty and holds no run"),
        ({"output": "train.jsonl"}, r"output: train.jsonl exists and is not a directory"),
    ],
)
def test_one_clear_error(changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd.xyz").write_text("x")
    Path("broken.jsonl").write_text('{"text": ')
    assert main(["train", *as_flags(settings(**changes))]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("doran: error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert not Path("run/adapter").exists()


def test_plot_says_what_it_needs() -> None:
    with pytest.raises(CheckpointError, match=r"cannot read missing\.parquet"):
        read_states("missing.parquet")
    assert main(["plot", "."]) == 2


def test_overwrite_waits_for_a_run_that_can_begin_and_leaves_other_files() -> None:
    run(trainer__max_steps=1)
    Path("run/notes.txt").write_text("mine")
    Path("run/layers.png").write_bytes(b"old")
    for broken in ({"data__train": "nowhere.jsonl"}, {"trainer__eval_strategy": "steps", "data__eval": "unset"}):
        values = {k: v for k, v in settings(trainer__max_steps=2, **broken).items() if v != "unset"}
        with pytest.raises(ConfigError):
            train(load_config(None, values), overwrite=True)
        assert json.loads(Path("run/metrics.json").read_text())["training"]["steps"] == 1
    train(load_config(None, settings(trainer__max_steps=2)), overwrite=True)
    assert json.loads(Path("run/metrics.json").read_text())["training"]["steps"] == 2
    assert Path("run/notes.txt").read_text() == "mine"
    assert not Path("run/layers.png").exists()


@pytest.mark.parametrize(
    "broken",
    [{"trainer__eval_strategy": "steps", "data__eval": "unset"}, {"adapter__target_modules": ["q_prj"]}],
)
def test_what_never_began_does_not_block_its_corrected_rerun(broken: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, DoranError)):
        run(**broken)
    assert not Path("run").exists()
    run(trainer__max_steps=1)
