"""Run a recipe: train by `doran train`'s code, score each task, one CSV row per task, method and seed."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import torch

from doran_hf.train import TrainConfig, load_config, train
from experiments.errors import ExperimentError
from experiments.paper.benchmark import ImageRows
from experiments.paper.commonsense import Commonsense, find_answer, write_answers
from experiments.paper.recipe import BENCHMARKS, Recipe

__all__ = ["Request", "run_recipe", "summary"]


@dataclass(frozen=True)
class Request:
    """What to run of a recipe.

    Attributes:
        folder: the examples.
        base: directory or hub name of the base model.
        out: a directory per training, and results.csv.
        method: a name of the recipe's.
        seed: of the training.
        tasks: names.
        validation: score on validation images, to choose settings by.
        changes: settings that go before the recipe's.
    """

    folder: Path
    base: str
    out: Path
    method: str
    seed: int
    tasks: tuple[str, ...]
    validation: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> str:
        """The changes as text."""
        return " ".join(f"{name}={value}" for name, value in sorted(self.changes.items()))

    def output(self, part: str) -> Path:
        """Where trainings with these settings, scored on this part, belong."""
        return self.out / " ".join(filter(None, [f"{self.method}-{part}-{self.seed}", self.settings])).replace("/", "-")


def run_recipe(recipe: Recipe, request: Request) -> list[dict[str, Any]]:
    """Train and score; trainings that are done, or were begun, in ``out`` are not made anew.

    Returns:
        A row per task, with its accuracy.

    Raises:
        ExperimentError: an unknown method or task.
        DoranError: what `doran train` refuses.
    """
    if request.method not in recipe.methods:
        raise ExperimentError(f"unknown method {request.method!r}; recipe {recipe.name} has {sorted(recipe.methods)}")
    if unknown := sorted(set(request.tasks) - set(recipe.tasks)):
        raise ExperimentError(f"unknown task {unknown[0]!r}; recipe {recipe.name} has {', '.join(recipe.tasks)}")
    if isinstance(BENCHMARKS[recipe.benchmark], Commonsense):
        return _commonsense(recipe, request)
    return [_images(recipe, request, task) for task in request.tasks]


def _config(recipe: Recipe, request: Request, output: Path, task: str, data: dict[str, Any]) -> TrainConfig:
    sections = {name: recipe.section(name, request.method, request.changes) for name in ("data", "adapter", "trainer")}
    values = {"base": request.base, "task": task, "output": str(output), "seed": request.seed, "evaluate_base": False}
    for name, section in {**sections, "data": {**sections["data"], **data}}.items():
        values |= {f"{name}.{key}": value for key, value in section.items()}
    return load_config(None, values)


def _images(recipe: Recipe, request: Request, task: str) -> dict[str, Any]:
    benchmark = BENCHMARKS[recipe.benchmark]
    assert not isinstance(benchmark, Commonsense)
    part = "validation" if request.validation else "test"
    rows = benchmark.rows(request.folder, task, validation=request.validation)
    files = _image_tables(rows, request.out / "data")
    output = request.output(part) / task
    config = _config(recipe, request, output, "image-classification", files)
    metrics = train(config)
    _free()
    return _row(request, task, part, metrics, metrics["adapter"]["accuracy"])


def _image_tables(rows: ImageRows, folder: Path) -> dict[str, Any]:
    """The images with their classes as parquet files, which `doran train` reads, named by what is in them."""
    from datasets import ClassLabel, Dataset, Features, Image

    folder.mkdir(parents=True, exist_ok=True)
    names = [str(number) for number in range(rows.classes)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    files = {}
    for key, images in (("train", rows.train), ("eval", rows.score)):
        digest = hashlib.sha256(repr((rows.classes, images)).encode()).hexdigest()[:16]
        file = folder / f"{digest}.parquet"
        files[key] = str(file)
        if file.is_file():
            continue
        columns = {"image": [str(path) for path, _ in images], "label": [label for _, label in images]}
        part = file.with_suffix(".part")
        Dataset.from_dict(columns, features=features).to_parquet(part)  # the images' bytes go into it
        part.rename(file)
    return files


def _commonsense(recipe: Recipe, request: Request) -> list[dict[str, Any]]:
    if request.validation:
        raise ExperimentError("the commonsense training has no validation part to score on; data.eval_size holds out")
    benchmark = Commonsense()
    tests = {task: benchmark.test_rows(request.folder, task) for task in request.tasks}
    file = request.out / "data" / "train.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in benchmark.training_rows(request.folder))
    part = file.with_suffix(".part")
    part.write_text("".join(lines), encoding="utf-8")
    part.rename(file)
    config = _config(recipe, request, request.output("test") / "commonsense", "causal-lm", {"train": str(file)})
    metrics = train(config)
    _free()
    model, tokenizer = _adapted(config)
    options = recipe.section("evaluation", request.method, request.changes)
    rows = []
    for task, examples in tests.items():
        prompts = [str(config.data.prompt).format_map(example) for example in examples]
        written = write_answers(model, tokenizer, prompts, **options)
        answers = [find_answer(task, text) for text in written]
        right = [answer == example["answer"] for answer, example in zip(answers, examples, strict=True)]
        row = _row(request, task, "test", metrics, sum(right) / len(right))
        rows.append({**row, "without_answer": answers.count(None)})
    return rows


def _adapted(config: TrainConfig) -> tuple[Any, Any]:
    """The trained model, merged, and its tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from doran_hf.train.recipe import load_tokenizer

    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    base = AutoModelForCausalLM.from_pretrained(config.base, dtype=dtype)
    merged = PeftModel.from_pretrained(base, str(Path(config.output) / "adapter")).merge_and_unload()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return merged.eval().to(device), load_tokenizer(config.base)


def _row(request: Request, task: str, part: str, metrics: Mapping[str, Any], accuracy: float) -> dict[str, Any]:
    training = metrics["training"]
    return {
        "method": request.method, "task": task, "part": part, "seed": request.seed, "accuracy": accuracy,
        "trainable_parameters": training["trainable_parameters"], "steps": training["steps"],
        "seconds": training["seconds"], "settings": request.settings,
    }  # fmt: skip


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of each task in percent, of each group, and the mean of the groups, each a mean over the seeds."""
    table = pandas.DataFrame(rows)
    of_task = 100 * table.groupby("task").accuracy.mean()
    lines = [f"{task}: {of_task[task]:.1f}" for task in recipe.tasks if task in of_task]
    means = {}
    for group, tasks in BENCHMARKS[recipe.benchmark].groups.items():
        if own := [of_task[task] for task in tasks if task in of_task]:
            means[group] = sum(own) / len(own)
            lines.append(f"{group}: {means[group]:.1f} ({len(own)} of {len(tasks)} tasks)")
    lines.append(f"mean of the groups: {sum(means.values()) / len(means):.1f}")
    return "\n".join(lines)
