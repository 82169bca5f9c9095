"""FGVC in the form in which visual prompt tuning shares its splits: JSON objects from an image's path to its class.

DIR/CUB_200_2011/{train,val,test}.json     paths are below the folder of the images, see :data:`IMAGES`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments.errors import ExperimentError
from experiments.paper.benchmark import ImageRows, Lack, read_json
from experiments.paper.images import image_lacks

__all__ = ["FGVC"]

CLASSES = {"CUB_200_2011": 200, "nabirds": 555, "OxfordFlower": 102, "Stanford-dogs": 120, "Stanford-cars": 196}
IMAGES = {"CUB_200_2011": "images", "nabirds": "images", "OxfordFlower": ".", "Stanford-dogs": "Images",
          "Stanford-cars": "."}  # fmt: skip
"""Folder, in that of the task, below which the paths are."""


class FGVC:
    """Five tasks of telling kinds of one thing apart."""

    groups: Mapping[str, tuple[str, ...]] = {"fgvc": tuple(CLASSES)}

    def rows(self, folder: Path, task: str, *, validation: bool = False) -> ImageRows:
        """The images of a task; the classes are numbered in the order of their ids.

        Args:
            folder: of all tasks.
            task: its name.
            validation: train on the training part alone and score on the validation part; else train on both and
                score on the test.

        Raises:
            ExperimentError: a file that is not there or not an object from paths to classes, or a class to score on
                that has no image to train on.
        """
        own = folder / task
        train, held_out = (_read(own / f"{part}.json") for part in ("train", "val"))
        score = held_out if validation else _read(own / "test.json")
        if not validation:
            train = {**train, **held_out}
        numbers = {label: number for number, label in enumerate(sorted(set(train.values())))}
        if unknown := sorted(set(score.values()) - set(numbers)):
            raise ExperimentError(f"{own}: the class {unknown[0]!r} is scored on but has no image to train on")
        images = own / IMAGES[task]
        rows = [[(images / path, numbers[label]) for path, label in part.items()] for part in (train, score)]
        return ImageRows(rows[0], rows[1], len(numbers))

    def lacks(self, folder: Path, tasks: tuple[str, ...]) -> list[Lack]:
        """What the folder lacks for these tasks."""
        return image_lacks(lambda task: self.rows(folder, task), tasks, CLASSES, None)


def _read(file: Path) -> dict[str, int]:
    wanted = "expected an object from an image's path to the number of its class"
    content = read_json(file, wanted)
    if not isinstance(content, dict) or not content:
        raise ExperimentError(f"{file}: {wanted}, got {type(content).__name__} of {len(content)} entries")
    try:
        return {path: int(label) for path, label in content.items()}
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{file}: {wanted}: {error}") from error
