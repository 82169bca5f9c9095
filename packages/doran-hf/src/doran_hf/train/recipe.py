"""The interface of a training task: its model, its examples, its collator and its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoTokenizer

from doran_core.errors import CheckpointError, ConfigError
from doran_core.targets import shortened
from doran_hf.random_start import modules_of, not_in
from doran_hf.train.config import TrainConfig
from doran_hf.train.data import Examples

__all__ = ["ExampleCounts", "Prepared", "TaskRecipe", "load_part", "load_tokenizer"]


@dataclass(frozen=True)
class ExampleCounts:
    """Counts of a file's examples.

    Attributes:
        examples: how many are used.
        cut: how many of them ``data.max_length`` has cut.
        left_out: how many others had nothing to learn left.
    """

    examples: int
    cut: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        cut = f", {self.cut} of them cut" if self.cut else ""
        return f"{self.examples} examples{cut}" + (
            f", {self.left_out} left out with nothing to learn" if self.left_out else ""
        )


@dataclass(frozen=True)
class Prepared:
    """Examples ready for the Trainer.

    Attributes:
        train: dataset to train on.
        held_out: dataset to evaluate on, or None.
        counts: of the examples of both, by "train" and "eval".
        sample: the first example, for people to read.
        classes: the classes, for people to read, or None.
    """

    train: Any
    held_out: Any | None
    counts: Mapping[str, ExampleCounts]
    sample: str
    classes: str | None = None


class TaskRecipe(ABC):
    """One task: its model, examples, collator and metrics.

    Args:
        config: the configuration.
        examples: raw examples.

    Raises:
        CheckpointError: the base model cannot be loaded.
        ConfigError: a column or class that is not there.
    """

    auto_model: ClassVar[Any]
    random: Collection[str] = ()  # parameters of the loaded model that the base lacks
    processor: Any
    compute_metrics: Any = None
    class_names: list[str] | None = None
    pad_token_id: int | None = None  # set in the model's configuration if it has none

    def __init__(self, config: TrainConfig, examples: Examples) -> None:
        self.config = config
        self.examples = examples

    @abstractmethod
    def prepare(self) -> Prepared:
        """The examples in the model's format."""

    @abstractmethod
    def collator(self) -> Any:
        """Makes a batch of examples."""

    def model(self) -> Any:
        """The base model."""
        dtype = self.config.dtype if self.config.dtype == "auto" else getattr(torch, self.config.dtype)
        options = self._model_options() | {"output_loading_info": True}
        model, report = load_part("model", self.auto_model, self.config.base, dtype=dtype, **options)
        self.random = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        return model

    def _model_options(self) -> dict[str, Any]:
        return {}

    def trained_in_full(self, model: Any) -> list[str]:
        """Modules to train and save beside the adapter: the user's modules_to_save, and modules that start at random.

        Raises:
            ConfigError: parameters that the base lacks and that no module holds alone.
        """
        return self._with_random(model, list(self.config.adapter.get("modules_to_save") or []))

    def _with_random(self, model: Any, wanted: list[str]) -> list[str]:
        lost = not_in(model, self.random, wanted)
        modules, others = modules_of(model, lost)
        if others:
            raise ConfigError(
                f"base: {self.config.base} lacks {shortened(others)} of {type(model).__name__}: they would start at "
                "random and not be saved, because their modules have other parameters, too; take a base that has them"
            )
        return [*wanted, *modules]

    def evaluate(self, model: Any, label: str) -> dict[str, float]:
        """Metrics beyond the Trainer's evaluation."""
        return {}


def load_tokenizer(base: str) -> Any:
    """The base model's tokenizer, able to pad."""
    tokenizer = load_part("tokenizer", AutoTokenizer, base)
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_part(what: str, auto_class: Any, base: str, **options: Any) -> Any:
    """One part of the base model.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    try:
        return auto_class.from_pretrained(base, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if Path(base).is_dir():
            raise CheckpointError(f"base: cannot load the {what} of {base!r}: {error}") from error
        raise CheckpointError(f"base: there is no directory {base!r}, and {_hub_says(error)}") from error


def _hub_says(error: BaseException) -> str:
    """Why the hub's model cannot be loaded, in a few words: transformers wraps the cause in paragraphs."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {type(cause).__name__ for cause in causes}
    if "HFValidationError" in names:
        return "it is not a name that a model on the hub can have"
    if "GatedRepoError" in names:
        return "the hub gives it only to those who have accepted its terms and logged in"
    if "RepositoryNotFoundError" in names:
        return "the hub has no such model, or shows it only to those who have logged in"
    if names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return "no model of that name is in the hub's cache, and the hub cannot be reached"
    return f"the hub's model of that name cannot be loaded: {' '.join(str(error).split())}"
