"""What the readers of lists of images have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.errors import ExperimentError
from experiments.paper.benchmark import ImageRows, Lack

__all__ = ["image_lacks", "missing_files"]

SHOWN = 3
"""Missing images named in a message."""


def missing_files(images: list[tuple[Path, int]]) -> str | None:
    """Which images of a list are not there, in a few words; None if all are."""
    missing = [path for path, _ in images if not path.is_file()]
    if not missing:
        return None
    shown = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
    return f"{len(missing)} of {len(images)} images are not there: {shown}"


def image_lacks(
    read: Callable[[str], ImageRows], tasks: tuple[str, ...], classes: Mapping[str, int], train_size: int | None
) -> list[Lack]:
    """What the images of tasks lack.

    Args:
        read: the rows of a task.
        tasks: their names.
        classes: how many each has in the benchmark.
        train_size: how many images each trains on there; None if that differs.
    """
    lacks: list[Lack] = []
    for task in tasks:
        try:
            rows = read(task)
        except ExperimentError as error:
            lacks.append(Lack(str(error)))
            continue
        for name, images in (("training", rows.train), ("test", rows.score)):
            if text := missing_files(images):
                lacks.append(Lack(f"{task}, {name}: {text}"))
        if train_size is not None and len(rows.train) != train_size:
            lacks.append(Lack(f"{task}: {len(rows.train)} images to train on, expected {train_size}", partial=True))
        seen = len({label for _, label in rows.train})
        if seen != classes[task]:
            text = f"{task}: {seen} classes among the training images, expected {classes[task]}"
            lacks.append(Lack(text, partial=True))
    return lacks
