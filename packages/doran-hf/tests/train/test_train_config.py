"""Configuration of `doran train`: files, flags, the commented template, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from transformers import TrainingArguments

from doran_core.cli.group import parse
from doran_core.cli.main import main
from doran_core.errors import ConfigError
from doran_hf import DoranConfig
from doran_hf.train import DataConfig, TrainConfig, load_config
from doran_hf.train.config import OWN_TRAINER_FIELDS
from doran_hf.train.fields import parse_yaml

MINIMAL = "base: b\noutput: o\ndata: {train: t.jsonl}\n"


def written(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_numbers_as_people_write_them() -> None:
    text = "[1e-3, 5E-4, 1.5e3, .5, 3., -2e+2, 1e5, .inf, 3, 1_000, v1e3, 0x1f, 12e, e5, '1e-3']"
    assert parse_yaml(text, "x") == [
        1e-3, 5e-4, 1.5e3, 0.5, 3.0, -200.0, 1e5, float("inf"), 3, 1000, "v1e3", 31, "12e", "e5", "1e-3",
    ]  # fmt: skip
    assert [type(v) for v in parse_yaml("[1e-3, 3, 1.0]", "x")] == [float, int, float]


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, MINIMAL + "adapter: {rank: 4, alpha: 8}\ntrainer:\n")
    config = load_config(file, {"adapter.rank": 16, "task": "causal-lm", "trainer.learning_rate": 1})
    assert config.adapter == {"rank": 16, "alpha": 8.0}
    assert config.adapter_config().rank == 16
    assert config.trainer == {"learning_rate": 1.0}
    assert config.data == DataConfig(train="t.jsonl")
    assert load_config(written(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rank: 3", r"config.yaml: unknown field 'rank'"),
        ("adapter: {rnk: 3}", r"adapter: unknown field 'rnk'; did you mean rank"),
        ("adapter: {rank: x}", r"adapter.rank: expected int, got 'x'"),
        ("adapter: {rank: 0}", r"rank: expected a positive integer, got 0"),
        ("adapter: {tau_kind: best}", r"adapter.tau_kind: expected one of .*'best'"),
        ("trainer: {learning_rat: 1}", r"trainer: unknown field 'learning_rat'; did you mean learning_rate"),
        ("trainer: {learning_rate: fast}", r"trainer.learning_rate: expected float, got 'fast'"),
        ("trainer: {output_dir: x}", r"trainer.output_dir: set output instead"),
        ("task: poetry", r"task: expected one of .*'poetry'"),
        ("data: {train: t, max_length: 0}", r"data.max_length: expected a positive integer, got 0"),
        ("data: {train: t, prompt: p}", r"prompt='p' and completion=None; give both or neither"),
        ("data: {train: t, choices: [a]}", r"data.choices: expected at least two"),
        ("data: {}", r"data.train: expected a file"),
        ("data: [t]", r"data: expected a mapping"),
        ("base: ''", r"base: expected a name or directory"),
        ("task: image-classification\ndata: {train: t, choices: [a, b]}", r"data.choices.* are for task causal-lm"),
        ("a: [", r"config.yaml: not valid YAML"),
        ("learning_rate: .e5", r"config.yaml: not valid YAML: could not convert"),
    ],
)
def test_what_is_wrong_is_named(change: str, message: str, tmp_path: Path) -> None:
    values = "\n".join(line for line in MINIMAL.splitlines() if line.partition(":")[0] + ":" not in change)
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, f"{values}\n{change}\n"))


def test_the_template_has_every_field_with_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--init"]) == 0
    text = Path("doran.yaml").read_text(encoding="utf-8")
    assert main(["train", "--init", "--base", "b"]) == 2  # it exists
    config = load_config("doran.yaml", {"base": "b", "output": "o", "data.train": "t"})
    assert config == TrainConfig(base="b", output="o", data=DataConfig(train="t"), trainer=OWN_TRAINER_FIELDS)
    uncommented = yaml.safe_load("\n".join(map(_uncomment, text.splitlines())))
    defaults = DoranConfig()
    for name, value in uncommented["adapter"].items():
        assert getattr(defaults, name) == (16 if name == "embedding_dim" else value), name
    assert uncommented["adapter"]["embedding_dim"] is None  # a number as soon as a rank is known
    assert {"rank", "tau_kind", "norm_grad", "target_modules", "sharing"} < set(uncommented["adapter"])
    assert all(
        "  # " in line for line in text.partition("\ntrainer:")[0].splitlines() if ": " in line and line[0] != "#"
    )


def _uncomment(line: str) -> str:
    return "  " + line[4:] if line.startswith("  # ") else line


def test_the_template_takes_the_flags_values(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    flags = ["--base", "b", "--output", "o", "--data.train", "t.csv", "--adapter.rank", "4", "--data.max-length", "9"]
    assert main(["train", "--init", str(file), *flags, "--trainer.max_steps", "3", "--data.chat"]) == 0
    config = load_config(file)
    assert (config.base, config.data.train, config.data.max_length, config.data.chat) == ("b", "t.csv", 9, True)
    assert config.adapter == {"rank": 4}
    assert config.trainer == {**OWN_TRAINER_FIELDS, "max_steps": 3}


def test_the_example_is_a_configuration() -> None:
    config = load_config(Path(__file__).parents[4] / "examples" / "train_sentiment.yaml")
    assert config.adapter_config().core() == DoranConfig().core()
    assert (config.trainer["learning_rate"], config.trainer["max_steps"]) == (2e-3, 100)


def test_every_field_is_a_flag() -> None:
    command = parse(["train", "--trainer.seed", "0"]).command
    names = {spelling for parameter in command.params for spelling in parameter.opts}
    for section, record in (("data", DataConfig), ("trainer", TrainingArguments)):
        for name in record.__dataclass_fields__:
            assert f"--{section}.{name}" in names
    assert {"--adapter.rank", "--adapter.tau_kind", "--base", "--task", "--seed", "--dtype"} < names


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data.completion", " {y}"], " {y}"),
        (["--adapter.target_modules", "[q_proj, v_proj]"], ["q_proj", "v_proj"]),
        (["--adapter.target_modules", "all-linear"], "all-linear"),
        (["--adapter.target_modules", ".*(q|v)_proj"], ".*(q|v)_proj"),
        (["--data.max_train", "null"], None),
        (["--trainer.learning_rate", "1e-3"], 1e-3),
        (["--evaluate-base", "false"], False),
    ],
)
def test_flags_are_read_as_their_fields_want(flags: list[str], expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("doran_hf.train.config.load_config", lambda file, values: seen.update(values) or Mock())
    monkeypatch.setattr("doran_hf.train.run.train", lambda config, **options: {})
    assert main(["train", *flags]) == 0
    assert list(seen.values()) == [expected]
