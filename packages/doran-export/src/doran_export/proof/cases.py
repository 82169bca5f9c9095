"""Inputs of a proof: random ones of several batch sizes and lengths, and those that the user gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from doran_core.errors import ConfigError
from doran_core.files.opening import named_errors
from doran_export.errors import ExportError
from doran_export.graph.spec import GraphSpec
from doran_export.runtime.session import Array, as_dtype

__all__ = ["GREEDY_STEPS", "Case", "given_cases", "greedy_prompts", "random_cases", "read_inputs"]

GREEDY_STEPS = 64
"""Number of tokens that a decoder's greedy proof generates."""

_SEED = 20251004
_BATCH = 16  # rows per batch of given texts: limits the memory for logits of a large vocabulary

_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain,",
    "def fibonacci(n):\n    ",
    "Review: a warm, funny, engaging film.\nSentiment:",
)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: its name in the report.
        inputs: arrays by input name, without the cache.
        chunks: lengths of the pieces in which a decoder's graph gets the sequence; empty for other models.
        given: whether the user gave the inputs; otherwise they are random.
    """

    name: str
    inputs: dict[str, Array]
    chunks: tuple[int, ...] = ()
    given: bool = False

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(next(iter(self.inputs.values())))

    @property
    def length(self) -> int | None:
        """Number of tokens per row, padding included; None for images."""
        return int(self.inputs["input_ids"].shape[1]) if "input_ids" in self.inputs else None


def random_cases(spec: GraphSpec, *, padded: bool = True) -> list[Case]:
    """Random inputs: single rows, batches, length 1, padding, and for decoders a past of several lengths.

    Args:
        spec: the graph.
        padded: whether rows of one batch may differ in length.
    """
    random = np.random.default_rng(_SEED)
    if spec.task.reads == "image":
        shape = [int(axis) for axis in spec.inputs["pixel_values"][1:]]
        return [
            Case(f"random, batch {batch}", {"pixel_values": random.standard_normal((batch, *shape), dtype=np.float32)})
            for batch in (1, 2, 5)
        ]
    plans: list[tuple[int, tuple[int, ...]]] = [(1, (1,)), (1, (9,)), (2, (16,))]
    if spec.task.has_cache:
        # Graphs without padding accept several tokens after a past for one row only.
        plans += [(1, (1, 1)), (3, (20, 1, 12)) if padded else (3, (20, 1, 1)), (1, (40, 3))]
    else:
        plans += [(3, (33,)), (4, (128,))]
    plans = [(batch, chunks) for batch, chunks in plans if sum(chunks) <= spec.max_length]
    return [_random_text(spec, random, batch, chunks, padded) for batch, chunks in plans]


def _random_text(
    spec: GraphSpec, random: np.random.Generator, batch: int, chunks: tuple[int, ...], padded: bool
) -> Case:
    length = sum(chunks)
    ids = random.integers(0, spec.vocabulary - 1, (batch, length))
    ids += ids >= spec.pad_token  # no padding token, which some models detect by its id
    padding = random.integers(0, length // 2 + 1, batch) * padded
    padding[0] = 0
    columns = np.arange(length)
    # Decoders are padded on the left, so that the last position is a real token; other models on the right.
    real = columns >= padding[:, None] if spec.task.has_cache else columns < length - padding[:, None]
    inputs = {"input_ids": np.where(real, ids, spec.pad_token), "attention_mask": real.astype(np.int64)}
    if "token_type_ids" in spec.inputs:
        inputs["token_type_ids"] = (columns >= length // 2).astype(np.int64) * np.ones((batch, 1), np.int64)
    pieces = f" as {'+'.join(map(str, chunks))}" if len(chunks) > 1 else ""
    name = f"random, batch {batch}, length {length}{pieces}"
    return Case(name, inputs, chunks if spec.task.has_cache else ())


def given_cases(spec: GraphSpec, given: Sequence[Any], tokenizer: Any, *, padded: bool = True) -> list[Case]:
    """Cases from the user's inputs.

    Args:
        spec: the graph.
        given: texts, or mappings from input names to arrays.
        tokenizer: a transformers tokenizer, or None where there is none.
        padded: whether rows of one batch may differ in length; else every text is a batch.

    Raises:
        ConfigError: texts without a tokenizer, or for an image model, or a mapping with other names or dtypes than the
            graph's.
    """
    texts = [item for item in given if isinstance(item, str)]
    cases = []
    if texts and (tokenizer is None or spec.task.reads == "image"):
        raise ConfigError("texts were given to compare on, but this model has no tokenizer: give arrays by input name")
    size = _BATCH if padded else 1
    for start in range(0, len(texts), size):
        batch = tokenizer(
            texts[start : start + size],
            padding=True,
            truncation=True,
            max_length=spec.max_length,
            return_tensors="np",
        )
        inputs = {name: np.asarray(batch[name]) for name in batch if name in spec.inputs}
        cases.append(_given(spec, f"given texts {start + 1}-{start + len(batch['input_ids'])}", inputs))
    for index, item in enumerate(item for item in given if not isinstance(item, str)):
        if not isinstance(item, Mapping):
            raise ConfigError(f"given input {index} is a {type(item).__name__}, expected a text or arrays by name")
        inputs = {
            name: as_dtype(name, np.asarray(value), np.float32 if name == "pixel_values" else np.int64)
            for name, value in item.items()
        }
        unknown = sorted(set(inputs) - set(spec.inputs))
        if unknown or spec.task.main_input not in inputs:
            raise ConfigError(
                f"given input {index} has {sorted(inputs)}, expected {spec.task.main_input} and what it needs"
            )
        cases.append(_given(spec, f"given arrays {index + 1}", inputs))
    return cases


def _given(spec: GraphSpec, name: str, inputs: dict[str, Array]) -> Case:
    if spec.task.reads == "text":
        inputs.setdefault("attention_mask", np.ones_like(inputs["input_ids"]))
    length = inputs["input_ids"].shape[1] if spec.task.reads == "text" else 0
    return Case(name, inputs, (length,) if spec.task.has_cache else (), given=True)


def greedy_prompts(spec: GraphSpec, given: Sequence[Any], tokenizer: Any) -> dict[str, Array]:
    """A batch of prompts, padded on the left, for the greedy proof: the given texts, or a few of our own."""
    room = spec.max_length - GREEDY_STEPS
    if tokenizer is None:
        random = np.random.default_rng(_SEED)
        return _random_text(spec, random, 3, (max(1, min(12, room)),), padded=True).inputs
    texts = [item for item in given if isinstance(item, str)][:32] or list(_PROMPTS)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max(1, room), return_tensors="np")
    return {name: np.asarray(batch[name]) for name in ("input_ids", "attention_mask")}


def read_inputs(path: Path) -> list[Any]:
    """Inputs from a file: ``.txt``, one text per line, or ``.npz``, arrays by input name.

    Raises:
        ExportError: the file is missing, empty or of another kind.
    """
    if not path.is_file():
        raise ExportError(f"input file {path} does not exist")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return [dict(arrays)]
        except (OSError, ValueError) as error:
            raise ExportError(f"{path} cannot be read as .npz: {error}") from error
    if path.suffix == ".txt":
        with named_errors(path, ExportError):
            texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if texts:
            return texts
        raise ExportError(f"{path} holds no text: expected one per line")
    raise ExportError(f"{path} is a {path.suffix or 'file without suffix'}: expected .txt (one text per line) or .npz")
