"""What a benchmark is to the runner: its tasks, its examples, and what its files lack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Benchmark", "ImageRows", "Lack"]


@dataclass(frozen=True)
class Lack:
    """Something that is not there, or not as the benchmark has it.

    Attributes:
        text: what and where.
        partial: the data can be used all the same, but the result is not the benchmark's.
    """

    text: str
    partial: bool = False


@dataclass(frozen=True)
class ImageRows:
    """Images to train on and to score on.

    Attributes:
        train, score: pairs of an image file and the number of its class.
        classes: how many classes there are.
    """

    train: list[tuple[Path, int]]
    score: list[tuple[Path, int]]
    classes: int


class Benchmark(Protocol):
    """A benchmark.

    Attributes:
        groups: tasks by group; the paper's mean is the mean of the groups' means.
    """

    groups: Mapping[str, tuple[str, ...]]

    def lacks(self, folder: Path, tasks: tuple[str, ...]) -> list[Lack]:
        """What the folder lacks for these tasks; empty if it is the benchmark."""
        ...
