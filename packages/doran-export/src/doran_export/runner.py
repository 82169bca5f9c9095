"""OnnxRunner: an exported directory as something to call, with greedy generation over a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from doran_core.errors import CheckpointError, ConfigError
from doran_export.files import MODEL_FILE, read_json
from doran_export.runtime import onnxruntime, open_session

__all__ = ["OnnxRunner"]

Array: TypeAlias = NDArray[Any]

_PAST, _PRESENT = "past_key_values.", "present."
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


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
        self.session = open_session(path, providers, threads=threads)
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith(_PAST)]
        self._device = "cuda" if "CUDAExecutionProvider" in self.session.get_providers() else "cpu"

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs that a caller gives: those of the graph without the cache."""
        return [name for name in self._inputs if not name.startswith(_PAST)]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs that a caller reads: those of the graph without the cache."""
        names = [value.name for value in self.session.get_outputs()]
        return [name for name in names if not name.startswith(_PRESENT)]

    @property
    def has_cache(self) -> bool:
        """Whether this is a decoder that can `generate`."""
        return bool(self._past)

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer that came along; pads on the left for a decoder.

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
            ConfigError: an input is missing or not one of the graph's.
        """
        feed = self._complete(inputs)
        outputs, _ = self._step(feed, self._empty_past(len(next(iter(feed.values())))))
        return outputs

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 64,
        stop_at_end: bool = True,
    ) -> Iterator[NDArray[np.int64]]:
        """Generate greedily, one token per row and step, as soon as each is known.

        Args:
            input_ids: prompts [batch, sequence], padded on the left.
            attention_mask: 1 for real tokens, 0 for padding [batch, sequence]; None means all are real.
            max_new_tokens: number of steps at most.
            stop_at_end: stop when every row has given an end token; a row that is done goes on with end tokens.

        Yields:
            The next token ids [batch].

        Raises:
            ConfigError: the model has no cache.
        """
        if not self.has_cache:
            raise ConfigError(f"{self.directory} is not a decoder with a cache: it cannot generate")
        feed = self._complete(
            {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        )
        mask, position = feed["attention_mask"], feed["position_ids"][:, -1:]
        batch = len(mask)
        past = self._empty_past(batch)
        ended: NDArray[np.bool_] = np.zeros(batch, dtype=bool)
        filler = min(self.end_tokens, default=0)
        for _ in range(max_new_tokens):
            outputs, past = self._step(feed, past)
            tokens = outputs["logits"][:, -1].argmax(-1).astype(np.int64)
            if stop_at_end:
                tokens = np.where(ended, filler, tokens)
                ended |= np.isin(tokens, list(self.end_tokens))
            yield tokens
            if stop_at_end and ended.all():
                return
            mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], axis=1)
            position = position + 1
            feed = {"input_ids": tokens[:, None], "attention_mask": mask, "position_ids": position}

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 64,
        stop_at_end: bool = True,
    ) -> NDArray[np.int64]:
        """The new tokens of `stream` at once [batch, at most max_new_tokens]."""
        steps = self.stream(input_ids, attention_mask, max_new_tokens=max_new_tokens, stop_at_end=stop_at_end)
        return np.stack(list(steps), axis=1)

    def generate_text(self, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """Greedy continuations of texts, without the prompts and without special tokens."""
        batch = self.tokenizer(list(prompts), return_tensors="np", padding=True)
        tokens = self.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=max_new_tokens)
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def run_in_chunks(self, inputs: Mapping[str, Any], chunks: Sequence[int]) -> Array:
        """Logits [batch, sequence, vocabulary] of a decoder fed in pieces of these lengths through its cache."""
        feed = self._complete(inputs)
        past = self._empty_past(len(feed["input_ids"]))
        parts, start = [], 0
        for length in chunks:
            end = start + length
            piece = {name: array[:, start:end] for name, array in feed.items()}
            piece["attention_mask"] = feed["attention_mask"][:, :end]
            outputs, past = self._step(piece, past)
            parts.append(outputs["logits"])
            start = end
        return np.concatenate(parts, axis=1)

    def _complete(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The given inputs as arrays of the graph's dtypes, with what follows from them filled in."""
        feed = {name: np.asarray(value) for name, value in inputs.items()}
        if "input_ids" in feed:
            feed.setdefault("attention_mask", np.ones_like(feed["input_ids"]))
            if "token_type_ids" in self._inputs:
                feed.setdefault("token_type_ids", np.zeros_like(feed["input_ids"]))
            if "position_ids" in self._inputs and "position_ids" not in feed:
                feed["position_ids"] = np.maximum(feed["attention_mask"].cumsum(axis=1) - 1, 0)
        expected = self.input_names
        if set(feed) != set(expected):
            raise ConfigError(f"inputs {sorted(feed)} were given, but {self.directory.name} reads {sorted(expected)}")
        return {name: feed[name].astype(self._dtype(name), copy=False) for name in expected}

    def _dtype(self, name: str) -> Any:
        return _NUMPY.get(self._inputs[name].type, np.int64)

    def _empty_past(self, batch: int) -> list[Any]:
        """A cache of length 0, as OrtValues on the session's device."""
        value = onnxruntime().OrtValue
        empty = []
        for name in self._past:
            _, heads, _, size = self._inputs[name].shape
            empty.append(
                value.ortvalue_from_numpy(np.zeros((batch, heads, 0, size), self._dtype(name)), self._device, 0)
            )
        return empty

    def _step(self, feed: Mapping[str, Array], past: Sequence[Any]) -> tuple[dict[str, Array], list[Any]]:
        """One run with bound inputs and outputs: the cache never leaves the device, nor is it copied."""
        binding = self.session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in zip(self._past, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        plain = self.output_names
        for output in self.session.get_outputs():
            binding.bind_output(output.name, self._device if output.name.startswith(_PRESENT) else "cpu")
        self.session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return {name: value.numpy() for name, value in zip(plain, values[: len(plain)], strict=True)}, values[
            len(plain) :
        ]
