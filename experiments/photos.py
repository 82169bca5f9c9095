"""Few-shot classification of photos, from folders as VTAB-1K's tasks have them: train/CLASS and test/CLASS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.data import Examples, Split
from experiments.errors import ExperimentError

__all__ = ["SIDE", "photo_files", "photo_split"]

SIDE = 98
"""Pixels: seven patches of 14. The photos have 128, CIFAR-10's 32; nine patches would take 1.6 times as long."""
VALIDATION_SHARE = 0.3
"""Of the test photos; they choose the learning rate and are in no test accuracy."""
SUFFIXES = (".jpg", ".jpeg", ".png")


def photo_files(folder: Path) -> dict[str, list[tuple[Path, int]]]:
    """The photos of "train" and "test" with the numbers of their classes, which are numbered by name.

    Raises:
        ExperimentError: a folder is not there, holds no photo, or the two have other classes.
    """
    classes = sorted(path.name for path in (folder / "train").glob("*") if path.is_dir())
    parts: dict[str, list[tuple[Path, int]]] = {}
    for part in ("train", "test"):
        own = sorted(path.name for path in (folder / part).glob("*") if path.is_dir())
        if not own or own != classes:
            raise ExperimentError(f"{folder / part}: expected folders of photos {classes or 'CLASS'}, found {own}")
        parts[part] = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((folder / part / name).iterdir())
            if file.suffix.lower() in SUFFIXES
        ]
        if not parts[part]:
            raise ExperimentError(f"{folder / part}: no photo ({', '.join(SUFFIXES)}) in its folders")
    return parts


def _read(rows: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, SIDE, SIDE]`` of bytes, and labels ``[N]``."""
    from PIL import Image

    images = []
    for file, _ in rows:
        try:
            with Image.open(file) as image:
                square = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        except OSError as error:
            raise ExperimentError(f"{file}: cannot be read as an image: {error}") from error
        images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    return torch.stack(images), torch.tensor([label for _, label in rows])


def photo_split(folder: Path) -> Split:
    """All training photos; of the test photos 30% for validation and the others for the test.

    Raises:
        ExperimentError: as :func:`photo_files`, or a file that is no image.
    """
    parts = photo_files(folder)
    held_out = parts["test"]
    order = np.random.default_rng(0).permutation(len(held_out))
    cut = round(VALIDATION_SHARE * len(held_out))
    rows = [parts["train"], [held_out[i] for i in order[:cut]], [held_out[i] for i in order[cut:]]]
    return Split.of(*(Examples(images, None, labels) for images, labels in map(_read, rows)))
