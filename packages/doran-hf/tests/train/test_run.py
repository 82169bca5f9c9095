"""`doran train` from files to an adapter, on tiny models: every task, every format, resuming, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_bert
from killing import train_and_kill
from peft import AutoPeftModelForCausalLM, PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_bases import make_tokenizer, save_image_base, save_text_base
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, ViTForImageClassification

from doran_core.cli.main import main
from doran_core.errors import CheckpointError, ConfigError, DoranError
from doran_hf.layer_table import read_states
from doran_hf.train import load_config, train
from doran_hf.train.config import DataConfig
from doran_hf.train.data import load_examples

ROWS = [
    {"text": f"{letter} {number}", "sentiment": "positive" if letter in "abc" else "negative"}
    for number in range(8)
    for letter in "abcdef"
]

CLASSIFY = {
    "data__prompt": None,
    "data__completion": None,
    "data__choices": None,
    "data__label": "sentiment",
}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(file: str, rows: list[dict[str, Any]] = ROWS) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def settings(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "base": str(save_text_base(Path("base"))),
        "output": "run",
        "data.train": write_rows("train.jsonl"),
        "data.eval": write_rows("test.jsonl", ROWS[::5]),
        "data.prompt": "Review: {text} Sentiment:",
        "data.completion": " {sentiment}",
        "data.choices": [" positive", " negative"],
        "data.append_eos": False,
        "adapter.rank": 4,
        "trainer.max_steps": 30,
        "trainer.learning_rate": 2e-2,
        "trainer.logging_steps": 5,
        "trainer.save_steps": 10,
        "trainer.disable_tqdm": True,
        "trainer.use_cpu": True,
    }
    return values | {name.replace("__", "."): value for name, value in changes.items()}


def as_flags(values: dict[str, Any]) -> list[str]:
    return [
        text
        for name, value in values.items()
        for text in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]


def run(**changes: Any) -> dict[str, Any]:
    return train(load_config(None, {k: v for k, v in settings(**changes).items() if v != "unset"}))


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


def test_killed_and_run_again_it_ends_as_if_it_had_not_been(capsys: pytest.CaptureFixture[str]) -> None:
    """Killed by SIGKILL after the first checkpoint; a second, half-written checkpoint lies about, too."""
    changes: dict[str, Any] = {"trainer__save_steps": 4}
    train_and_kill(as_flags(settings(**changes)), Path("run/checkpoints/checkpoint-4"), step_seconds=0.2)
    assert not Path("run/metrics.json").exists()
    half = Path("run/checkpoints/checkpoint-999")
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 9')
    metrics = run(**changes)
    assert re.search(r"resuming +from checkpoint-4\n", capsys.readouterr().out)
    assert metrics["training"]["resumed_from"] == "checkpoint-4"
    assert json.loads(Path("run/metrics.json").read_text()) == metrics

    whole = run(**changes, output="whole")
    expected = load_file("whole/adapter/adapter_model.safetensors")
    found = load_file("run/adapter/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (metrics["base"], metrics["adapter"], metrics["tau"]) == (whole["base"], whole["adapter"], whole["tau"])
    assert read_states("run/layers.parquet") == read_states("whole/layers.parquet")


def test_killed_before_its_first_file_or_after_its_last_it_is_finished() -> None:
    changes: dict[str, Any] = {"trainer__max_steps": 2, "trainer__save_steps": 1}
    Path("run").mkdir()
    Path("run/.config.yaml.0123abcd.doran-tmp").write_text("base: b")
    run(**changes)
    names = sorted(str(path) for path in Path("run").rglob("*"))
    assert not [name for name in names if "doran-tmp" in name or "checkpoint" in name]

    Path("run/checkpoints/checkpoint-2").mkdir(parents=True)  # killed between metrics.json and their removal
    run(**changes)
    assert sorted(str(path) for path in Path("run").rglob("*")) == names


def test_killed_after_its_last_step_it_does_not_train_on(capsys: pytest.CaptureFixture[str]) -> None:
    """As if by a kill during the last evaluation: the last checkpoint is there, the adapter and the metrics are not."""
    changes: dict[str, Any] = {"trainer__max_steps": 4, "trainer__save_steps": 4, "keep_checkpoints": True}
    whole = run(**changes)
    expected = load_file("run/adapter/adapter_model.safetensors")
    Path("run/metrics.json").unlink()
    shutil.rmtree("run/adapter")
    printed = capsys.readouterr().out.rpartition("wrote run/adapter")[2]
    again = run(**changes)
    assert printed
    assert capsys.readouterr().out.endswith(printed)
    assert again["training"]["resumed_from"] == "checkpoint-4"
    assert (again["training"]["steps"], again["adapter"], again["tau"]) == (4, whole["adapter"], whole["tau"])
    found = load_file("run/adapter/adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sequence_classification_with_names_as_labels() -> None:
    metrics = run(
        base=str(save_text_base(Path("bert"), "bert")),
        task="sequence-classification",
        data__prompt="unset",
        data__completion="unset",
        data__choices="unset",
        data__append_eos="unset",
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
        data__prompt="unset",
        data__completion="unset",
        data__choices="unset",
        data__append_eos="unset",
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
        data__prompt="unset",
        data__completion="unset",
        data__choices="unset",
        data__append_eos="unset",
    )
    assert metrics["training"]["examples"] == 16
    assert metrics["adapter"]["accuracy"] == 1.0
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    base = ViTForImageClassification.from_pretrained("vit", num_labels=2, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, "run/adapter")
    light = torch.full((1, 1, 8, 8), 210 / 255 * 2 - 1)
    with torch.no_grad():
        assert model.eval()(pixel_values=light).logits.argmax() == 1


def test_every_format_gives_the_same_rows() -> None:
    import pandas

    frame = pandas.DataFrame(ROWS)
    write_rows("a.jsonl")
    frame.to_csv("a.csv", index=False)
    frame.to_csv("a.tsv", index=False, sep="\t")
    frame.to_parquet("a.parquet")
    frame.to_json("a.json", orient="records")
    for file in ("a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.json"):
        assert list(load_examples(DataConfig(train=file), seed=0).train) == ROWS, file
    Path("a.txt").write_text("\n".join(row["text"] for row in ROWS))
    assert [row["text"] for row in load_examples(DataConfig(train="a.txt"), seed=0).train] == [r["text"] for r in ROWS]


def test_held_out_examples_are_the_seeds_and_apart() -> None:
    write_rows("a.jsonl")
    first, again, other = (load_examples(DataConfig(train="a.jsonl", eval_size=10), seed=s) for s in (1, 1, 2))
    assert list(first.eval) == list(again.eval) != list(other.eval)
    assert sorted(r["text"] for part in (first.train, first.eval) for r in part) == sorted(r["text"] for r in ROWS)
    assert len(load_examples(DataConfig(train="a.jsonl", max_train=3), seed=0).train) == 3


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
            r"data.max_length: an example to choose in has 6 tokens with the choice ' a b', 5 are kept",
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


def _three_classes(**changes: Any) -> dict[str, Any]:
    rows = [
        {"text": f"{letter} {number}", "topic": "xyz"["abcdef".index(letter) // 2]}
        for number in range(8)
        for letter in "abcdef"
    ]
    unset = {f"data__{name}": "unset" for name in ("prompt", "completion", "choices", "append_eos")}
    values = {
        "task": "sequence-classification",
        "data__train": write_rows("topics.jsonl", rows),
        "data__eval": write_rows("topics-test.jsonl", rows[::5]),
        "data__label": "topic",
        "adapter__target_modules": "all-linear",
        "trainer__max_steps": 60,
    }
    return unset | values | changes


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


def test_splits_of_image_folders_are_not_guessed() -> None:
    for name in ("train/dark", "train/light", "plain/dark", "plain/light"):
        Path("images", name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(Path("images", name, "0.png"))
    Path("images/plain").rename("plain")
    both = DataConfig(train="images", eval="plain")
    assert len(load_examples(both, seed=0).eval) == 2  # another folder with one split
    assert len(load_examples(DataConfig(train="plain"), seed=0).train) == 2
    with pytest.raises(ConfigError, match=r"data.eval_split: 'images' has no split 'test'; its splits are \['train'\]"):
        load_examples(DataConfig(train="images", eval="images"), seed=0)


def test_a_suffix_in_capitals() -> None:
    Path("A.TSV").write_text("text\tlabel\na b\tc\n")
    assert list(load_examples(DataConfig(train="A.TSV"), seed=0).train) == [{"text": "a b", "label": "c"}]
