"""A study's YAML as a list of runs. A run is named by the hash of all that decides its result."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import ExperimentError
from experiments.methods import METHODS, is_generated

__all__ = ["Run", "Study", "load_study"]

VERSION = 1
"""Part of every run's id: raise it when the same specification comes to mean another computation."""


@dataclass(frozen=True)
class Run:
    """One training: all that decides its result, and nothing else.

    Attributes:
        model: a name in :mod:`experiments.tasks`, such as minilm, or with a folder of the user's, dinov2/flowers5.
        method: a name in :data:`experiments.methods.METHODS`.
        options: further options of DoranConfig, or the runner's own, as sorted pairs. With generated factors they
            always tell the start: its default has changed once.
        targets: endings of the names of the adapted layers.
        budget_rank: LoRA's rank, which sets the budget.
        match: "parameters" gives the method the rank that comes nearest to LoRA's number of parameters; "rank" gives it
            LoRA's rank.
        rate: peak learning rate of what the method trains.
        head_rate: of the classifier's head; the method ``head`` uses ``rate``.
        steps: of the optimizer.
        batch: examples in a step.
        fraction: share of the training examples that the run may see.
        seed: of the start, the subset and the order.
        evaluated: most examples of validation and of test that are used; None for all.
        measure_factors: also keep the generated factors' spectra and similarities.
    """

    model: str
    method: str
    options: tuple[tuple[str, Any], ...]
    targets: tuple[str, ...]
    budget_rank: int
    match: str
    rate: float
    head_rate: float
    steps: int
    batch: int
    fraction: float
    seed: int
    evaluated: int | None = None
    measure_factors: bool = False

    @property
    def id(self) -> str:
        """16 hexadecimal digits."""
        text = json.dumps([VERSION, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def cohort(self) -> Run:
        """What runs must have in common to be computed in one stack: all but rate, fraction and seed."""
        return dataclasses.replace(self, rate=0.0, fraction=0.0, seed=0)


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
        name: the file's.
        question: one sentence.
        arms: the runs of each compared variant, by its name in tables.
        parallel: most runs of one stack.
    """

    name: str
    question: str
    arms: Mapping[str, tuple[Run, ...]]
    parallel: int

    def only(self, arms: Collection[str]) -> Study:
        """The study with some of its arms.

        Raises:
            ExperimentError: it has no arm of such a name.
        """
        if unknown := sorted(set(arms) - set(self.arms)):
            raise ExperimentError(f"study {self.name}: no arm {unknown}; its arms are {sorted(self.arms)}")
        return dataclasses.replace(self, arms={name: self.arms[name] for name in arms})

    def first_seeds(self, count: int) -> Study:
        """The study with the first seeds of each arm."""
        arms = {}
        for name, runs in self.arms.items():
            seeds = sorted({run.seed for run in runs})[:count]
            arms[name] = tuple(run for run in runs if run.seed in seeds)
        return dataclasses.replace(self, arms=arms)

    def at_rates(self, chosen: Mapping[tuple[str, float], float]) -> Study:
        """The study at one rate for each arm and share of the data; without those that have none."""
        arms = {
            name: tuple(run for run in runs if chosen.get((name, run.fraction)) == run.rate)
            for name, runs in self.arms.items()
        }
        return dataclasses.replace(self, arms=arms)

    def runs(self) -> Iterator[tuple[str, Run]]:
        """All runs with the names of their arms."""
        return ((arm, run) for arm, runs in self.arms.items() for run in runs)


_KEYS = {
    "question", "model", "targets", "budget_rank", "steps", "batch", "head_rate", "rates", "fractions", "seeds",
    "first_seed", "parallel", "evaluated", "measure_factors", "stability", "arms", "short",
}  # fmt: skip
_ARM_KEYS = {"model", "method", "rates", "fractions", "seeds", "first_seed", "targets", "budget_rank", "match"}


def load_study(path: Path, *, short: bool = False) -> Study:
    """Read a study.

    Args:
        path: the YAML.
        short: with what its ``short`` section puts in place of its settings.

    Raises:
        ExperimentError: an unknown or missing key or a value of the wrong kind, named.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ExperimentError(f"{path}: cannot be read as a study: {error}") from error
    if not isinstance(content, dict):
        raise ExperimentError(f"{path}: expected a mapping of settings, got {type(content).__name__}")
    settings = {**content, **(content.get("short", {}) if short else {})}
    if unknown := sorted(set(settings) - _KEYS):
        raise ExperimentError(f"{path}: unknown key(s) {unknown}; known are {sorted(_KEYS)}")
    optional = {"short", "evaluated", "measure_factors", "stability", "first_seed"}
    if missing := sorted(_KEYS - optional - set(settings)):
        raise ExperimentError(f"{path}: missing key(s) {missing}")
    arms = {name: tuple(_arm_runs(path, name, arm or {}, settings)) for name, arm in settings["arms"].items()}
    return Study(path.stem, settings["question"], arms, int(settings["parallel"]))


def _arm_runs(path: Path, name: str, arm: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Run]:
    method = arm.get("method", name)
    if method not in METHODS:
        raise ExperimentError(f"{path}: arms.{name}: unknown method {method!r}; known are {sorted(METHODS)}")
    told = {key: value for key, value in arm.items() if key not in _ARM_KEYS}
    if is_generated(method, told):
        told = {"generator_init": "identity", **told}
    options = tuple(sorted((key, _hashable(value)) for key, value in told.items()))
    chosen = {"match": "parameters", "first_seed": 0, **settings, **{key: arm[key] for key in _ARM_KEYS & set(arm)}}
    for key in ("budget_rank", "steps", "batch", "seeds"):
        if type(chosen[key]) is not int or chosen[key] < 1:
            raise ExperimentError(
                f"{path}: {key} of arm {name!r}: expected a whole number above 0, got {chosen[key]!r}"
            )
    if type(first := chosen["first_seed"]) is not int or first < 0:
        raise ExperimentError(f"{path}: first_seed of arm {name!r}: expected a whole number, got {first!r}")
    for key in ("rates", "fractions", "targets"):
        if not isinstance(chosen[key], list) or not chosen[key]:
            raise ExperimentError(f"{path}: {key} of arm {name!r}: expected a list, got {chosen[key]!r}")
    for fraction in chosen["fractions"]:
        if not 0.0 < float(fraction) <= 1.0:
            raise ExperimentError(f"{path}: fractions of arm {name!r}: expected shares in (0, 1], got {fraction!r}")
    if chosen["match"] not in ("parameters", "rank"):
        raise ExperimentError(f"{path}: match of arm {name!r}: expected parameters or rank, got {chosen['match']!r}")
    seeds = range(first, first + int(chosen["seeds"]))
    grid = itertools.product(seeds, chosen["fractions"], chosen["rates"])
    for seed, fraction, rate in grid:
        yield Run(
            model=chosen["model"],
            method=method,
            options=options,
            targets=tuple(chosen["targets"]),
            budget_rank=int(chosen["budget_rank"]),
            match=chosen["match"],
            rate=float(rate),
            head_rate=float(settings["head_rate"]),
            steps=int(settings["steps"]),
            batch=int(settings["batch"]),
            fraction=float(fraction),
            seed=seed,
            evaluated=settings.get("evaluated"),
            measure_factors=bool(settings.get("measure_factors", False)),
        )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
