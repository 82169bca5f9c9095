"""VTAB-1K in the form in which parameter-efficient methods share it: lists of images by task.

DIR/cifar/train800val200.txt     1,000 lines "images/train800val200/000000.jpg 19": a path and a class
DIR/cifar/train800.txt, val200.txt    the same 1,000, for choosing settings
DIR/cifar/test.txt
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments.errors import ExperimentError
from experiments.paper.benchmark import ImageRows, Lack
from experiments.paper.images import image_lacks

__all__ = ["VTAB"]

CLASSES = {
    "cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10,
    "sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5, "clevr_count": 8,
    "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16, "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}  # fmt: skip
TRAIN, VALIDATION = 1000, 200


class VTAB:
    """19 tasks of 1,000 training images in three groups."""

    groups: Mapping[str, tuple[str, ...]] = {
        "natural": ("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
        "specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
        "structured": (
            "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi",
            "smallnorb_ele",
        ),
    }  # fmt: skip

    def rows(self, folder: Path, task: str, *, validation: bool = False) -> ImageRows:
        """The images of a task.

        Args:
            folder: of all tasks.
            task: its name.
            validation: train on 800 and score on 200 instead of the test.

        Raises:
            ExperimentError: a list that is not there, or a line that is no path and class.
        """
        train, score = ("train800.txt", "val200.txt") if validation else ("train800val200.txt", "test.txt")
        classes = CLASSES[task]
        own = folder / task
        return ImageRows(_read(own / train, classes), _read(own / score, classes), classes)

    def lacks(self, folder: Path, tasks: tuple[str, ...]) -> list[Lack]:
        """What the folder lacks for these tasks."""
        return image_lacks(lambda task: self.rows(folder, task), tasks, CLASSES, TRAIN)


def _read(file: Path, classes: int) -> list[tuple[Path, int]]:
    if not file.is_file():
        raise ExperimentError(f"{file} is not there: expected lines of an image's path and its class")
    images = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.rpartition(" ")
        if not path or not label.isdecimal() or int(label) >= classes:
            raise ExperimentError(f"{file}, line {number}: expected a path and a class below {classes}, got {line!r}")
        images.append((file.parent / path.strip(), int(label)))
    if not images:
        raise ExperimentError(f"{file} is empty: expected lines of an image's path and its class")
    return images
