"""What the readers of benchmarks give: rows of images, and what the files lack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ImageRows", "Lack"]


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
