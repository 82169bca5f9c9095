"""The task causal-lm: plain texts, prompts with completions, chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from doran_core.errors import ConfigError
from doran_hf.train.choice_accuracy import check_choices, choice_accuracy
from doran_hf.train.config import TrainConfig
from doran_hf.train.data import Examples
from doran_hf.train.recipe import ExampleCounts, Prepared, TaskRecipe, load_tokenizer
from doran_hf.train.text import IGNORED, TextEncoder

__all__ = ["CausalLM"]


class CausalLM(TaskRecipe):
    """Next-token prediction on texts, completions or an assistant's turns."""

    auto_model = AutoModelForCausalLM

    def __init__(self, config: TrainConfig, examples: Examples) -> None:
        super().__init__(config, examples)
        self.processor = load_tokenizer(config.base)
        self.encoder = TextEncoder(config.data, self.processor, examples.train.column_names)

    def prepare(self) -> Prepared:
        counts: dict[str, ExampleCounts] = {}
        train, counts["train"] = self._encode(self.examples.train, "train")
        held_out = None
        if self.examples.eval is not None:
            held_out, counts["eval"] = self._encode(self.examples.eval, "eval")
        if self.examples.eval is not None and self.config.data.choices is not None:
            check_choices(self.encoder, self.examples.eval)  # fail before hours of training, not after
        first = train[0]
        learned = [token for token, label in zip(first["input_ids"], first["labels"], strict=True) if label != IGNORED]
        sample = f"{self.processor.decode(first['input_ids'])!r}, learned: {self.processor.decode(learned)!r}"
        return Prepared(train, held_out, counts, sample)

    def _encode(self, rows: Any, name: str) -> tuple[Any, ExampleCounts]:
        encoded = rows.map(
            self.encoder, remove_columns=rows.column_names, load_from_cache_file=False, desc=f"tokenizing {name}"
        )
        kept = encoded.filter(_has_labels, input_columns="labels", load_from_cache_file=False, desc=f"checking {name}")
        if not len(kept):
            raise ConfigError(
                f"data.{name}: nothing to learn is left of {len(rows)} examples cut to {self.config.data.max_length} "
                "tokens; raise data.max_length or check the completions"
            )
        counts = ExampleCounts(len(kept), sum(kept["cut"]), len(rows) - len(kept))
        return kept.remove_columns("cut"), counts

    def collator(self) -> Any:
        return DataCollatorForSeq2Seq(self.processor, label_pad_token_id=IGNORED)

    def evaluate(self, model: Any, label: str) -> dict[str, float]:
        rows = self.examples.eval
        if rows is None or self.config.data.choices is None:
            return {}
        return {"accuracy": choice_accuracy(model, self.encoder, rows, label)}


def _has_labels(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])  # no prediction precedes the first token
