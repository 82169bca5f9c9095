"""The commonsense benchmark on small data of the same form, and recipes as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from doran_hf.train import load_config
from experiments.__main__ import main
from experiments.errors import ExperimentError
from experiments.paper.commonsense import ANSWERS, find_answer, write_answers
from experiments.paper.recipe import RECIPES, load_recipe

PROMPT = str(load_recipe("commonsense-llama-7b").value("data.prompt"))
TASKS = ["boolq", "piqa"]


def rows_of(task: str, count: int) -> list[dict[str, str]]:
    """Questions with an answer each, of ever other lengths."""
    rows = []
    for index in range(count):
        answer = ANSWERS[task][index % len(ANSWERS[task])]
        question = " ".join(["is", *["very"] * (index % 4), "red", "good", "?"])
        rows.append(
            {"instruction": question, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
        )
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark's files with a few examples each."""
    folder = tmp_path_factory.mktemp("commonsense")
    train = rows_of("boolq", 24) + rows_of("piqa", 24)
    (folder / "commonsense_170k.json").write_text(json.dumps(train))
    for task in TASKS:
        (folder / task).mkdir()
        (folder / task / "test.json").write_text(json.dumps(rows_of(task, 9)))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights that knows the words of the examples."""
    folder = tmp_path_factory.mktemp("llama")
    rows = [row for task in TASKS for row in rows_of(task, 8)]
    texts = [PROMPT.format_map(row) + row["output"] for row in rows]
    words = ["<pad>", "<unk>", "<eos>", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=128
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=2, pad_token_id=0,
        initializer_range=0.5,  # so that the prompt decides what comes
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """The likeliest token after the other, one prompt alone, without a cache."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def test_a_batch_writes_what_each_prompt_alone_would(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [PROMPT.format_map(row) for row in rows_of("boolq", 7)]
    written = write_answers(model, tokenizer, prompts, new_tokens=5, beams=1, batch=3)
    assert written == [greedy(model, tokenizer, prompt, 5) for prompt in prompts]
    assert len(set(written)) > 1  # else the order would not show


@pytest.mark.parametrize(
    ("task", "written", "answer"),
    [
        ("boolq", "the correct answer is True.", "true"),
        ("boolq", "false, not true", "false"),
        ("piqa", "Solution2", "solution2"),
        ("ARC-Easy", "it is answer4 or answer1", "answer4"),
        ("hellaswag", "ending3", "ending3"),
        ("winogrande", "option", None),
        ("openbookqa", "", None),
    ],
)
def test_the_first_of_the_tasks_words_counts(task: str, written: str, answer: str | None) -> None:
    assert find_answer(task, written) == answer


def test_a_training_is_scored_on_each_test(data: Path, base: Path, tmp_path: Path) -> None:
    changes = ["trainer.max_steps=6", "trainer.learning_rate=1e-2", "trainer.use_cpu=true", "trainer.bf16=false"]
    changes += ["trainer.warmup_steps=0", "data.eval_size=8", "adapter.rank=4", "evaluation.new_tokens=6"]
    changes += ["evaluation.beams=1", "evaluation.batch=4"]
    arguments = ["paper", "commonsense-llama-7b", "--data", str(data), "--base", str(base), "--tasks", *TASKS]
    arguments += ["--partial", "--out", str(tmp_path), *(part for change in changes for part in ("--set", change))]
    assert main(arguments) == 0
    table = pandas.read_csv(tmp_path / "results.csv").set_index("task")
    (run,) = tmp_path.glob("doran-test-0*/commonsense")
    assert load_config(run / "config.yaml").data.prompt == PROMPT
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for task in TASKS:
        answers = [find_answer(task, greedy(model, tokenizer, PROMPT.format_map(row), 6)) for row in rows_of(task, 9)]
        right = [answer == row["answer"] for answer, row in zip(answers, rows_of(task, 9), strict=True)]
        assert table.accuracy[task] == pytest.approx(sum(right) / 9)
        assert table.without_answer[task] == answers.count(None)


def test_check_says_what_the_files_lack(
    data: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["paper", "commonsense-llama-13b", "--base", str(base), "--check"]
    assert main([*arguments, "--data", str(data)]) == 1
    said = capsys.readouterr().out
    assert "missing: 6" in said
    assert f"{data / 'ARC-Easy' / 'test.json'} is not there" in said
    assert "boolq: 9 examples, expected 3,270" in said
    assert "commonsense_170k.json: 48 examples, expected 170,420" in said
    row = {"instruction": "?", "output": "maybe", "answer": "maybe"}
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([row]))
    (tmp_path / "commonsense_170k.json").write_text(json.dumps([{"instruction": "?"}]))
    assert main([*arguments, "--data", str(tmp_path), "--tasks", "boolq"]) == 1
    said = capsys.readouterr().out
    assert "entry 0: expected an answer among ['true', 'false'], got 'maybe'" in said
    assert "entry 0: expected a list of objects with instruction, output, answer" in said


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_a_configuration_of_doran_train(name: str) -> None:
    recipe = load_recipe(name)
    assert {"doran", "dora"} <= set(recipe.methods)
    for method in recipe.methods:
        values: dict[str, Any] = {"base": recipe.value("base"), "output": "runs", "data.train": "rows.jsonl"}
        values["task"] = "causal-lm" if recipe.benchmark == "commonsense" else "image-classification"
        for section in ("data", "adapter", "trainer"):
            values |= {f"{section}.{key}": value for key, value in recipe.section(section, method, {}).items()}
        config = load_config(None, values)
        assert config.adapter_config().rank == recipe.value("adapter.rank")
    assert all(setting.note for setting in recipe.settings.values())
    assert recipe.settings["base"].known
    assert not recipe.settings["adapter.rank"].known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark": "glue"}, "unknown benchmark 'glue'; known are"),
        ({"more": 1}, "expected the keys"),
        ({"settings": {"rank": {"value": 8, "from": "paper", "note": ""}}}, "unknown setting 'rank'"),
        ({"settings": {"adapter.rank": 8}}, "adapter.rank: expected value, from"),
        ({"settings": {"adapter.rank": {"value": 8, "from": "memory", "note": ""}}}, "adapter.rank: expected value"),
        ({"settings": {}}, "missing setting 'base'"),
        ({"methods": {"doran": {"tau": 1}}}, r"methods.doran: unknown setting 'tau'"),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = yaml.safe_load((RECIPES / "vtab1k.yaml").read_text(encoding="utf-8"))
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(ExperimentError, match=message):
        load_recipe(str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no recipe 'nothing'; there are commonsense-llama-13b, commonsense-llama-7b, fgvc, vtab1k"),
        (["vtab1k", "--tasks", "mnist"], "unknown task 'mnist'; recipe vtab1k has cifar,"),
    ],
)
def test_one_clear_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", *arguments, "--data", "."]) == 2
    assert message in capsys.readouterr().err
