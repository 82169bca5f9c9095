"""The command ``python -m experiments paper RECIPE``: say what is missing, or run the recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas
import yaml

from experiments.errors import ExperimentError
from experiments.paper.lacking import lacks, told
from experiments.paper.recipe import load_recipe

__all__ = ["add_arguments", "run_command"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("recipe", help="name in experiments/recipes, or a YAML file")
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmark's examples")
    parser.add_argument("--base", help="directory or hub name of the base model; by default the recipe's")
    parser.add_argument("--check", action="store_true", help="say what is missing, and what is not known; run nothing")
    parser.add_argument("--out", type=Path, help="folder of trainings and results.csv; resumes")
    parser.add_argument("--method", default="doran", help="one of the recipe's methods (default: doran)")
    parser.add_argument("--tasks", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: as many as the recipe says, from 0")
    parser.add_argument("--validation", action="store_true", help="score on validation images, to choose settings by")
    parser.add_argument("--partial", action="store_true", help="run on data that are not the whole benchmark's, too")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value, as trainer.learning_rate=2e-3",
    )


def run_command(args: argparse.Namespace) -> int:
    """Check or run; 1 if something is missing.

    Raises:
        ExperimentError: something is missing for a run, or an argument is wrong.
    """
    recipe = load_recipe(args.recipe)
    tasks = tuple(args.tasks or recipe.tasks)
    if unknown := sorted(set(tasks) - set(recipe.tasks)):
        raise ExperimentError(f"unknown task {unknown[0]!r}; recipe {recipe.name} has {', '.join(recipe.tasks)}")
    base = args.base or recipe.value("base")
    found = lacks(recipe, args.data, base, tasks)
    refused = [lack for lack in found if not (lack.partial and args.partial)]
    if args.check:
        print(told(recipe, found))
        return 1 if refused else 0
    if refused:
        more = f" and {len(refused) - 1} more (--check shows all)" if len(refused) > 1 else ""
        hint = "; --partial runs on it all the same" if all(lack.partial for lack in refused) else ""
        raise ExperimentError(f"{refused[0].text}{more}{hint}")
    if args.out is None:
        raise ExperimentError("--out: expected a folder for trainings and results")
    from experiments.paper.training import Request, run_recipe, summary

    changes = dict(_change(text) for text in args.set)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds if args.seeds is not None else range(int(recipe.value("seeds"))):
        request = Request(args.data, base, args.out, args.method, seed, tasks, args.validation, changes)
        rows += run_recipe(recipe, request)
        _add(args.out / "results.csv", rows)
    print(summary(recipe, rows))
    return 0


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or "." not in name:
        raise ExperimentError(f"--set: expected SECTION.FIELD=VALUE, as trainer.learning_rate=2e-3, got {text!r}")
    number = yaml.safe_load(value)
    try:  # YAML takes 2e-3 for a text
        return name, float(number) if isinstance(number, str) else number
    except ValueError:
        return name, number


def _add(file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows into a CSV file, in the place of earlier ones of the same runs."""
    keys = ["method", "task", "part", "seed", "settings"]
    table = pandas.DataFrame(rows)
    if file.is_file():
        table = pandas.concat([pandas.read_csv(file, keep_default_na=False), table])
    part = file.with_suffix(".part")
    table.drop_duplicates(keys, keep="last").to_csv(part, index=False)
    part.rename(file)
