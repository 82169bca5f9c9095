"""The tasks sequence-classification and image-classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
)

# The name at the top of transformers asks for torchvision up to 5.17; the class itself takes Pillow's processors.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from doran_core.errors import ConfigError
from doran_hf.train.config import TrainConfig
from doran_hf.train.data import Examples
from doran_hf.train.labels import Labels
from doran_hf.train.recipe import ExampleCounts, Prepared, TaskRecipe, load_part, load_tokenizer
from doran_hf.train.text import fill

__all__ = ["ImageClassification", "SequenceClassification"]


class _Classification(TaskRecipe):
    """The common part of classifying texts and images."""

    def __init__(self, config: TrainConfig, examples: Examples) -> None:
        super().__init__(config, examples)
        self.labels = Labels.of(config.data, examples.train)
        if examples.eval is not None:
            self.labels.check_same(config.data, examples.eval)
        self.class_names = self.labels.names
        self.compute_metrics = self._metrics

    def _model_options(self) -> dict[str, Any]:
        names = dict(enumerate(self.labels.names))
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "ignore_mismatched_sizes": True,
        }

    def trained_in_full(self, model: Any) -> list[str]:
        wanted = list(self.config.adapter.get("modules_to_save") or [])
        for name, child in model.named_children():
            if name == model.base_model_prefix or not any(True for _ in child.parameters()):
                continue
            parts = {name, *(inner.rpartition(".")[2] for inner, _ in child.named_modules())}
            if parts.isdisjoint(wanted):  # else the user has chosen which part of the head to train
                wanted.append(name)
        return self._with_random(model, wanted)

    def _metrics(self, prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        found, right = torch.as_tensor(logits).argmax(-1), torch.as_tensor(prediction.label_ids)
        return {"accuracy": float((found == right).double().mean()), "macro_f1": _macro_f1(found, right)}


class SequenceClassification(_Classification):
    """A class for each text, or pair of texts."""

    auto_model = AutoModelForSequenceClassification

    def __init__(self, config: TrainConfig, examples: Examples) -> None:
        super().__init__(config, examples)
        self.processor = load_tokenizer(config.base)

    def model(self) -> Any:
        model = super().model()
        if model.config.pad_token_id is None:  # decoders read the last token before the padding
            model.config.pad_token_id = self.pad_token_id = self.processor.pad_token_id
        return model

    def prepare(self) -> Prepared:
        counts: dict[str, ExampleCounts] = {}
        train, counts["train"] = self._encode(self.examples.train, "train")
        held_out = None
        if self.examples.eval is not None:
            held_out, counts["eval"] = self._encode(self.examples.eval, "eval")
        first = train[0]
        sample = f"{self.processor.decode(first['input_ids'])!r}, class: {self.labels.names[first['labels']]!r}"
        return Prepared(train, held_out, counts, sample, self.labels.described())

    def _encode(self, rows: Any, name: str) -> tuple[Any, ExampleCounts]:
        data = self.config.data

        def encode(row: Mapping[str, Any]) -> dict[str, Any]:
            pair = None if data.text_pair is None else fill(data.text_pair, row, "data.text_pair")
            text = fill(data.text or "text", row, "data.text")
            encoded = self.processor(text, pair)
            if cut := len(encoded["input_ids"]) > data.max_length:
                encoded = self.processor(text, pair, truncation=True, max_length=data.max_length)
            return {**encoded, "labels": self.labels.index(row[data.label]), "cut": cut}

        encoded = rows.map(
            encode, remove_columns=rows.column_names, load_from_cache_file=False, desc=f"tokenizing {name}"
        )
        return encoded.remove_columns("cut"), ExampleCounts(len(encoded), sum(encoded["cut"]))

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
        self.processor = load_part("image processor", AutoImageProcessor, config.base)
        channels = getattr(load_part("configuration", AutoConfig, config.base), "num_channels", 3)
        self.mode = "L" if channels == 1 else "RGB"

    def prepare(self) -> Prepared:
        train = self.examples.train.with_transform(self._transform)
        held_out = None if self.examples.eval is None else self.examples.eval.with_transform(self._transform)
        rows = {"train": self.examples.train, "eval": self.examples.eval}
        counts = {name: ExampleCounts(len(part)) for name, part in rows.items() if part is not None}
        first = self.examples.train[0]
        sample = f"{first[self.config.data.image]}, class: {self.labels.name(first[self.config.data.label])!r}"
        return Prepared(train, held_out, counts, sample, self.labels.described())

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


def _macro_f1(found: Tensor, right: Tensor) -> float:
    """Mean over the classes that occur of ``2 hits / (found + right)``."""
    scores = []
    for name in set(found.tolist()) | set(right.tolist()):
        hits = float(((found == name) & (right == name)).sum())
        scores.append(2 * hits / float((found == name).sum() + (right == name).sum()))
    return sum(scores) / len(scores)
