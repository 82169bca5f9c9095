"""Examples as `datasets.Dataset`s: from local files, image folders or named datasets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doran_core.errors import ConfigError, DoranError, require
from doran_hf.train.config import DataConfig

__all__ = ["Examples", "load_examples"]

_SUFFIXES = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}


@dataclass(frozen=True)
class Examples:
    """Raw examples to train on and to evaluate on (or None)."""

    train: Any
    eval: Any | None


def load_examples(config: DataConfig, seed: int) -> Examples:
    """Load the training and the held-out examples that the configuration names.

    Args:
        config: the data section.
        seed: of the choice of held-out examples.

    Raises:
        ConfigError: a missing file, an unknown kind of file, an empty set, or too many examples to hold out.
        MissingDependencyError: the package datasets is not installed.
    """
    train = _load(config, config.train, "data.train", config.train_split)
    held_out = None
    if config.eval is not None:
        held_out = _load(config, config.eval, "data.eval", config.eval_split)
    elif config.eval_size:
        if config.eval_size >= len(train):
            raise ConfigError(f"data.eval_size: {config.eval_size} of the {len(train)} examples leave none to train on")
        parts = train.train_test_split(test_size=config.eval_size, seed=seed)
        train, held_out = parts["train"], parts["test"]
    return Examples(_first(train, config.max_train), None if held_out is None else _first(held_out, config.max_eval))


def _first(dataset: Any, count: int | None) -> Any:
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def _load(config: DataConfig, source: str, where: str, split: str) -> Any:
    datasets = require("datasets", package="doran-hf", extra="train", purpose="reading examples")
    kind, path = _kind(config, source, where), Path(source)
    try:
        if kind == "hub":
            dataset = datasets.load_dataset(source, config.subset, split=split)
        elif kind == "imagefolder":
            found = datasets.load_dataset("imagefolder", data_dir=str(path.resolve()))
            dataset = found[_split_of_folder(config, source, where, split, list(found))]
        else:
            options = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
            dataset = datasets.load_dataset(kind, data_files=str(path.resolve()), split="train", **options)
    except DoranError:
        raise
    except Exception as error:  # datasets has no common error class, and wraps its readers' errors
        cause = error.__cause__ or error
        raise ConfigError(f"{where}: cannot read {source!r} as {kind}: {type(cause).__name__}: {cause}") from error
    if len(dataset) == 0:
        raise ConfigError(f"{where}: {source!r} holds no examples")
    return dataset


def _split_of_folder(config: DataConfig, source: str, where: str, split: str, found: list[str]) -> str:
    """A folder without split folders is one split, and a training split is not used for evaluation."""
    if split in found:
        return split
    apart = where == "data.train" or Path(source).resolve() != Path(config.train).resolve()
    if len(found) == 1 and apart:
        return found[0]
    raise ConfigError(f"{where}_split: {source!r} has no split {split!r}; its splits are {found}")


def _kind(config: DataConfig, source: str, where: str) -> str:
    path = Path(source)
    if config.format == "hub":
        return "hub"
    if path.is_dir():
        if config.format in ("auto", "imagefolder"):
            return "imagefolder"
        raise ConfigError(f"{where}: {source!r} is a folder, expected a {config.format} file")
    if path.is_file():
        if config.format == "imagefolder":
            raise ConfigError(f"{where}: {source!r} is a file, expected a folder of images")
        kind = _SUFFIXES.get(path.suffix.lower()) if config.format == "auto" else config.format
        if kind is None:
            raise ConfigError(f"{where}: cannot tell the format of {source!r}; known suffixes are {sorted(_SUFFIXES)}")
        return kind
    if path.suffix.lower() in _SUFFIXES or path.is_absolute() or config.format != "auto" or source.startswith("."):
        raise ConfigError(f"{where}: {source!r} does not exist")
    return "hub"
