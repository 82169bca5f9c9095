"""What the readers of benchmarks share: rows of images, what the files lack, and JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import ExperimentError

__all__ = ["ImageRows", "Lack", "read_json"]


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


def read_json(file: Path, wanted: str) -> Any:
    """What a JSON file holds.

    Args:
        file: to read.
        wanted: what is expected in it, for the message.

    Raises:
        ExperimentError: the file is not there, or not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"{file} is not there: {wanted}") from error
    except ValueError as error:
        raise ExperimentError(f"{file}: not JSON ({error}): {wanted}") from error
