"""The three tasks: the model, the examples as it wants them, the collator and the metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

from doran_core.errors import CheckpointError, ConfigError
from doran_hf.train.choices import choice_accuracy
from doran_hf.train.config import TrainConfig
from doran_hf.train.data import Examples
from doran_hf.train.labels import Labels
from doran_hf.train.text import IGNORED, TextEncoder, fill

__all__ = ["Prepared", "TaskRecipe", "recipe_for"]


class Prepared:
    """Examples ready for the Trainer.

    Attributes:
        train: dataset to train on.
        held_out: dataset to evaluate on, or None.
        dropped: how many examples had nothing to learn after cutting.
        sample: the first example, for people to read.
    """

    def __init__(self, train: Any, held_out: Any | None, dropped: int, sample: str) -> None:
        self.train, self.held_out, self.dropped, self.sample = train, held_out, dropped, sample


class TaskRecipe(ABC):
    """What one task makes of a configuration and its examples.

    Args:
        config: the configuration.
        examples: raw examples.

    Raises:
        CheckpointError: the base model cannot be loaded.
        ConfigError: a column or class that is not there.
    """

    auto_model: ClassVar[Any]
    processor: Any
    compute_metrics: Any = None

    def __init__(self, config: TrainConfig, examples: Examples) -> None:
        self.config = config
        self.examples = examples

    @abstractmethod
    def prepare(self) -> Prepared:
        """The examples as the model wants them."""

    @abstractmethod
    def collator(self) -> Any:
        """Makes a batch of examples."""

    def model(self) -> Any:
        """The base model."""
        dtype = self.config.dtype if self.config.dtype == "auto" else getattr(torch, self.config.dtype)
        return _load("model", self.auto_model, self.config.base, dtype=dtype, **self._model_options())

    def _model_options(self) -> dict[str, Any]:
        return {}

    def head(self, model: Any) -> list[str] | None:
        """Modules to train in full beside the adapter, where neither PEFT nor the user names them."""
        return None

    def evaluate(self, model: Any, label: str) -> dict[str, float]:
        """Metrics that the Trainer's evaluation does not give."""
        return {}


class CausalLM(TaskRecipe):
    """Next tokens, of texts, completions or an assistant's turns."""

    auto_model = AutoModelForCausalLM

    def __init__(self, config: TrainConfig, examples: Examples) -> None:
        super().__init__(config, examples)
        self.processor = _tokenizer(config.base)
        self.encoder = TextEncoder(config.data, self.processor, examples.train.column_names)

    def prepare(self) -> Prepared:
        train, dropped = self._encode(self.examples.train, "train")
        held_out = None if self.examples.eval is None else self._encode(self.examples.eval, "eval")[0]
        first = train[0]
        learned = [token for token, label in zip(first["input_ids"], first["labels"], strict=True) if label != IGNORED]
        sample = f"{self.processor.decode(first['input_ids'])!r}, learned: {self.processor.decode(learned)!r}"
        return Prepared(train, held_out, dropped, sample)

    def _encode(self, rows: Any, name: str) -> tuple[Any, int]:
        encoded = rows.map(
            self.encoder, remove_columns=rows.column_names, load_from_cache_file=False, desc=f"tokenizing {name}"
        )
        kept = encoded.filter(_has_labels, input_columns="labels", load_from_cache_file=False, desc=f"checking {name}")
        if not len(kept):
            raise ConfigError(
                f"data.{name}: nothing to learn is left of {len(rows)} examples cut to {self.config.data.max_length} "
                "tokens; raise data.max_length or check the completions"
            )
        return kept, len(rows) - len(kept)

    def collator(self) -> Any:
        return DataCollatorForSeq2Seq(self.processor, label_pad_token_id=IGNORED)

    def evaluate(self, model: Any, label: str) -> dict[str, float]:
        rows = self.examples.eval
        if rows is None or self.config.data.choices is None:
            return {}
        return {"accuracy": choice_accuracy(model, self.encoder, rows, label)}


class _Classification(TaskRecipe):
    """What classifying texts and images have in common."""

    def __init__(self, config: TrainConfig, examples: Examples) -> None:
        super().__init__(config, examples)
        self.labels = Labels.of(config.data, examples.train)
        if examples.eval is not None:
            self.labels.check_same(config.data, examples.eval)
        self.compute_metrics = self._metrics

    def _model_options(self) -> dict[str, Any]:
        names = dict(enumerate(self.labels.names))
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "ignore_mismatched_sizes": True,
        }

    def head(self, model: Any) -> list[str] | None:
        if self.config.adapter.get("modules_to_save") is not None:
            return None
        named = [(name, child) for name, child in model.named_children() if name != model.base_model_prefix]
        return [name for name, child in named if any(True for _ in child.parameters())] or None

    def _metrics(self, prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        found, right = torch.as_tensor(logits).argmax(-1), torch.as_tensor(prediction.label_ids)
        return {"accuracy": float((found == right).double().mean()), "macro_f1": _macro_f1(found, right)}


class SequenceClassification(_Classification):
    """A class for each text, or pair of texts."""

    auto_model = AutoModelForSequenceClassification

    def __init__(self, config: TrainConfig, examples: Examples) -> None:
        super().__init__(config, examples)
        self.processor = _tokenizer(config.base)

    def model(self) -> Any:
        model = super().model()
        if model.config.pad_token_id is None:  # decoders look for the last token before the padding
            model.config.pad_token_id = self.processor.pad_token_id
        return model

    def prepare(self) -> Prepared:
        train = self._encode(self.examples.train, "train")
        held_out = None if self.examples.eval is None else self._encode(self.examples.eval, "eval")
        first = train[0]
        sample = f"{self.processor.decode(first['input_ids'])!r}, class: {self.labels.names[first['labels']]!r}"
        return Prepared(train, held_out, 0, sample)

    def _encode(self, rows: Any, name: str) -> Any:
        data = self.config.data

        def encode(row: Mapping[str, Any]) -> dict[str, Any]:
            pair = None if data.text_pair is None else fill(data.text_pair, row, "data.text_pair")
            text = fill(data.text or "text", row, "data.text")
            encoded = self.processor(text, pair, truncation=True, max_length=data.max_length)
            return {**encoded, "labels": self.labels.index(row[data.label])}

        return rows.map(encode, remove_columns=rows.column_names, load_from_cache_file=False, desc=f"tokenizing {name}")

    def collator(self) -> Any:
        return DataCollatorWithPadding(self.processor)


class ImageClassification(_Classification):
    """A class for each image."""

    auto_model = AutoModelForImageClassification

    def __init__(self, config: TrainConfig, examples: Examples) -> None:
        super().__init__(config, examples)
        column = config.data.image
        if column not in examples.train.column_names:
            raise ConfigError(
                f"data.image: no column {column!r}; the columns are {sorted(examples.train.column_names)}"
            )
        self.processor = _load("image processor", AutoImageProcessor, config.base)
        channels = getattr(_load("configuration", AutoConfig, config.base), "num_channels", 3)
        self.mode = "L" if channels == 1 else "RGB"

    def prepare(self) -> Prepared:
        train = self.examples.train.with_transform(self._transform)
        held_out = None if self.examples.eval is None else self.examples.eval.with_transform(self._transform)
        first = self.examples.train[0]
        sample = f"{first[self.config.data.image]}, class: {self.labels.name(first[self.config.data.label])!r}"
        return Prepared(train, held_out, 0, sample)

    def _transform(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        data = self.config.data
        images = [image.convert(self.mode) for image in rows[data.image]]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": [self.labels.index(label) for label in rows[data.label]]}

    def collator(self) -> Any:
        return _stack_images


def _stack_images(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def recipe_for(config: TrainConfig, examples: Examples) -> TaskRecipe:
    """The recipe of the configuration's task."""
    recipes: dict[str, type[TaskRecipe]] = {
        "causal-lm": CausalLM,
        "sequence-classification": SequenceClassification,
        "image-classification": ImageClassification,
    }
    return recipes[config.task](config, examples)


def _tokenizer(base: str) -> Any:
    tokenizer = _load("tokenizer", AutoTokenizer, base)
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(what: str, auto_class: Any, base: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(base, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(f"base: cannot load the {what} of {base!r}: {error}") from error


def _has_labels(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])  # the first token is predicted from nothing


def _macro_f1(found: Tensor, right: Tensor) -> float:
    """Mean over the classes that occur of ``2 hits / (found + right)``."""
    scores = []
    for name in set(found.tolist()) | set(right.tolist()):
        hits = float(((found == name) & (right == name)).sum())
        scores.append(2 * hits / float((found == name).sum() + (right == name).sum()))
    return sum(scores) / len(scores)
