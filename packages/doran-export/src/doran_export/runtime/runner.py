"""OnnxRunner: runs an exported directory, with greedy generation over a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doran_core.errors import CheckpointError, ConfigError
from doran_export.files import GENAI_CONFIG, MODEL_FILE, adapter_files, read_json
from doran_export.runtime.session import Array, GraphSession, as_dtype

__all__ = ["OnnxRunner"]


class OnnxRunner:
    """Runs a directory that `export` wrote.

    Args:
        directory: the exported directory.
        providers: onnxruntime execution providers, best first; None takes the best available one.
        threads: threads within one operator; None leaves it to onnxruntime.

    Raises:
        CheckpointError: the directory holds no exported model.
        ConfigError: a provider is not available.
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(
        self, directory: str | Path, *, providers: Sequence[str] | None = None, threads: int | None = None
    ) -> None:
        self.directory = Path(directory)
        path = self.directory / MODEL_FILE
        if not path.is_file():
            raise CheckpointError(f"{self.directory} has no {MODEL_FILE}: expected a directory that `export` wrote")
        decoder = read_json(self.directory / GENAI_CONFIG).get("model", {}).get("decoder", {})
        self.graph = GraphSession(path, providers, threads, decoder.get("head_size"))
        self.adapter: str | None = None

    @property
    def session(self) -> Any:
        """The onnxruntime.InferenceSession."""
        return self.graph.session

    @property
    def input_names(self) -> list[str]:
        """Names of the caller's inputs: all inputs of the graph except the cache."""
        return self.graph.input_names

    @property
    def output_names(self) -> list[str]:
        """Names of the caller's outputs: all outputs of the graph except the cache."""
        return self.graph.output_names

    @property
    def has_cache(self) -> bool:
        """Whether this is a decoder that can `generate`."""
        return bool(self.graph.past_names)

    @property
    def takes_padding(self) -> bool:
        """Whether rows of one batch may differ in length. Graphs of onnxruntime-genai count positions by themselves."""
        return not self.has_cache or "position_ids" in self.input_names

    @property
    def adapters(self) -> list[str]:
        """Names of the directory's adapters."""
        return list(adapter_files(self.directory))

    def set_adapter(self, name: str | None) -> None:
        """Select an adapter of the directory for all following runs; None selects the base. The session stays.

        A running generation continues with the new adapter.

        Raises:
            ConfigError: there is no adapter of this name.
        """
        files = adapter_files(self.directory)
        if name is not None and name not in files:
            known = ", ".join(files) or "none"
            raise ConfigError(
                f"{self.directory} has no adapter {name!r}: expected one of {known}, or None for the base"
            )
        self.graph.activate(None if name is None else files[name])
        self.adapter = name

    @cached_property
    def tokenizer(self) -> Any:
        """The directory's transformers tokenizer; pads on the left for a decoder.

        Raises:
            CheckpointError: the directory has none.
        """
        from doran_export.loading import load_tokenizer

        tokenizer = load_tokenizer(self.directory, pad_left=self.has_cache)
        if tokenizer is None:
            raise CheckpointError(f"{self.directory} has no tokenizer")
        return tokenizer

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end a generation, from generation_config.json or config.json."""
        for name in ("generation_config.json", "config.json"):
            value = read_json(self.directory / name).get("eos_token_id")
            if value is not None:
                return frozenset(value if isinstance(value, list) else [value])
        return frozenset()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """One pass without a past.

        Args:
            inputs: arrays by input name; ``input_ids`` [batch, sequence] or ``pixel_values`` [batch, ...]. A missing
                ``attention_mask`` means that all tokens are real; positions are counted from the mask.

        Returns:
            Outputs by name, e.g. ``logits``.

        Raises:
            ConfigError: an input is missing, not one of the graph's, or of a dtype that does not fit.
        """
        feed = self._complete(inputs)
        outputs, _ = self.graph.step(feed, self.graph.empty_past(len(next(iter(feed.values())))))
        return outputs

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 64,
        stop_at_end: bool = True,
    ) -> Iterator[NDArray[np.int64]]:
        """Generate greedily; yields one token per row and step.

        Args:
            input_ids: prompts [batch, sequence], padded on the left.
            attention_mask: 1 for real tokens, 0 for padding [batch, sequence]; None means all are real.
            max_new_tokens: number of steps at most.
            stop_at_end: stop when every row has an end token; a finished row repeats end tokens.

        Yields:
            The next token ids [batch].

        Raises:
            ConfigError: the model has no cache, the prompts are not rows of one length, or one is padded on the right.
        """
        if not self.has_cache:
            raise ConfigError(f"{self.directory} is not a decoder with a cache: it cannot generate")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        feed = self._complete(
            {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        )
        mask = feed["attention_mask"]
        if not mask[:, -1].all() or (np.diff(mask, axis=1) < 0).any():
            raise ConfigError("attention_mask: expected prompts padded on the left, got one whose padding is elsewhere")
        batch = len(mask)
        past = self.graph.empty_past(batch)
        ended: NDArray[np.bool_] = np.zeros(batch, dtype=bool)
        filler = min(self.end_tokens, default=0)
        for _ in range(max_new_tokens):
            outputs, past = self.graph.step(feed, past)
            tokens = outputs["logits"][:, -1].argmax(-1).astype(np.int64)
            if stop_at_end:
                tokens = np.where(ended, filler, tokens)
                ended |= np.isin(tokens, list(self.end_tokens))
            yield tokens
            if stop_at_end and ended.all():
                return
            mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], axis=1)
            positions = {"position_ids": feed["position_ids"][:, -1:] + 1} if self.takes_padding else {}
            feed = {"input_ids": tokens[:, None], "attention_mask": mask, **positions}

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 64,
        stop_at_end: bool = True,
    ) -> NDArray[np.int64]:
        """All new tokens of `stream` [batch, at most max_new_tokens]."""
        steps = self.stream(input_ids, attention_mask, max_new_tokens=max_new_tokens, stop_at_end=stop_at_end)
        return np.stack(list(steps), axis=1)

    def generate_text(self, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """Greedy continuations of texts, without the prompts and without special tokens."""
        texts: list[str] = []
        size = len(prompts) if self.takes_padding else 1
        for start in range(0, len(prompts), max(1, size)):
            batch = self.tokenizer(list(prompts[start : start + size]), return_tensors="np", padding=True)
            tokens = self.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=max_new_tokens)
            texts += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def run_in_chunks(self, inputs: Mapping[str, Any], chunks: Sequence[int]) -> Array:
        """Logits [batch, sequence, vocabulary] of a decoder fed in pieces of these lengths through its cache."""
        feed = self._complete(inputs)
        past = self.graph.empty_past(len(feed["input_ids"]))
        parts, start = [], 0
        for length in chunks:
            end = start + length
            piece = {name: array[:, start:end] for name, array in feed.items()}
            piece["attention_mask"] = feed["attention_mask"][:, :end]
            outputs, past = self.graph.step(piece, past)
            parts.append(outputs["logits"])
            start = end
        return np.concatenate(parts, axis=1)

    def _complete(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The given inputs as arrays of the graph's dtypes, with mask and positions filled in."""
        feed = {name: _as_array(name, value) for name, value in inputs.items()}
        if "input_ids" in feed:
            feed.setdefault("attention_mask", np.ones_like(feed["input_ids"]))
            shapes = [feed[name].shape for name in ("input_ids", "attention_mask")]
            if len(shapes[0]) != 2 or 0 in shapes[0] or shapes[0] != shapes[1]:
                raise ConfigError(
                    f"input_ids: expected [batch, sequence] and an attention_mask like it, got {list(shapes[0])} and "
                    f"{list(shapes[1])}"
                )
            if "token_type_ids" in self.input_names:
                feed.setdefault("token_type_ids", np.zeros_like(feed["input_ids"]))
            if "position_ids" in self.input_names and "position_ids" not in feed:
                feed["position_ids"] = np.maximum(feed["attention_mask"].cumsum(axis=1) - 1, 0)
            if not self.takes_padding and not feed["attention_mask"].all():
                raise ConfigError(f"{self.directory.name} takes no padding: give rows of one length, or one at a time")
        expected = self.input_names
        if set(feed) != set(expected):
            raise ConfigError(f"inputs {sorted(feed)} were given, but {self.directory.name} reads {sorted(expected)}")
        return {name: as_dtype(name, feed[name], self.graph.numpy_type(name)) for name in expected}


def _as_array(name: str, value: Any) -> Array:
    try:
        return np.asarray(value)
    except ValueError as error:
        lengths = [len(row) if isinstance(row, Sized) else type(row).__name__ for row in value]
        raise ConfigError(
            f"{name}: expected rows of one length, got rows of {lengths}; pad them to one length and mark the padding "
            "with 0 in attention_mask, or use generate_text"
        ) from error
