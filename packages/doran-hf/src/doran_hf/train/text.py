"""Texts as tokens and labels for a causal LM: plain text, prompt and completion, or a chat by its template.

The whole text is rendered and tokenized once. A token's position in the text decides whether the loss includes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from doran_core.errors import ConfigError
from doran_hf.train.config import DataConfig

__all__ = ["IGNORED", "TextEncoder", "fill"]

IGNORED = -100
"""Label of a token that the loss leaves out."""

Shape = Literal["text", "prompt", "messages"]


@dataclass(frozen=True)
class _Rendered:
    """A text, its spans to learn, and whether the tokenizer adds its special tokens."""

    text: str
    spans: Sequence[tuple[int, int]]
    add_special_tokens: bool


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """A column's text, or a template with the columns' values in braces.

    Raises:
        ConfigError: a named column does not exist, or the template is neither a column nor has braces and would give
            every row the same text.
    """
    if template in row:
        return str(row[template])
    if "{" not in template:
        raise ConfigError(f"{where}: {template!r} is no column and has none in braces; the columns are {sorted(row)}")
    try:
        return template.format_map(row)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {template!r} needs {error}; the columns are {sorted(row)}") from error


class TextEncoder:
    """Turns rows into ``input_ids`` and ``labels``.

    Args:
        config: the data section.
        tokenizer: a fast tokenizer, with a chat template where chats are asked for.
        columns: the examples' columns; they decide the form of an example if the configuration does not.

    Raises:
        ConfigError: no column to take text from, no chat template, or a tokenizer without offsets.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, columns: Sequence[str]) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.shape = _shape(config, columns)
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"base: {type(tokenizer).__name__} does not report the positions of tokens; use a fast tokenizer"
            )
        if (self.shape == "messages" or config.chat) and not tokenizer.chat_template:
            raise ConfigError(
                "base: its tokenizer has no chat template; use data.prompt and data.completion without chat"
            )
        if config.choices is not None and self.shape != "prompt":
            raise ConfigError(f"data.choices: needs data.prompt and data.completion, but the examples are {self.shape}")

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Tokens of one row, cut to ``max_length``, their labels (``IGNORED`` for none), and whether it was "cut"."""
        if self.shape == "messages":
            return self._encode(self._chat(row[self.config.messages or "messages"]))
        if self.shape == "text":
            text = fill(self.config.text or "text", row, "data.text")
            return self._encode(_Rendered(text, [(0, len(text))], add_special_tokens=True))
        return self.encode_pair(*self.pair(row))

    def pair(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Prompt and completion of one row."""
        prompt = fill(self.config.prompt or "prompt", row, "data.prompt")
        return prompt, fill(self.config.completion or "completion", row, "data.completion")

    def encode_pair(self, prompt: str, completion: str) -> dict[str, Any]:
        """Tokens of one prompt and completion, cut to ``max_length``, their labels, and whether they were "cut"."""
        return self._encode(self._pair(prompt, completion))

    def encode_whole_pair(self, prompt: str, completion: str) -> dict[str, list[int]]:
        """Tokens and labels of one prompt and completion.

        Raises:
            ConfigError: ``max_length`` would cut off the end of the completion, which is to be compared.
        """
        encoded = self._tokens(self._pair(prompt, completion))
        length, limit = len(encoded["input_ids"]), self.config.max_length
        if length > limit:
            raise ConfigError(
                f"data.max_length: an example has {length} tokens with the choice {completion!r}, and only {limit} are "
                "kept, so its choices cannot be compared; raise data.max_length or shorten the prompts"
            )
        return encoded

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> _Rendered:
        if not isinstance(messages, list) or not all("role" in turn and "content" in turn for turn in messages):
            raise ConfigError(f'data.messages: expected a list of {{"role", "content"}}, got {messages!r}')
        turns = [dict(turn) for turn in messages]
        if self.config.system is not None:
            turns.insert(0, {"role": "system", "content": self.config.system})
        text = self._template(turns)
        spans = []
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            start = len(self._prefix_of(text, turns[:index], add_generation_prompt=True))
            spans.append((start, len(self._prefix_of(text, turns[: index + 1]))))
        if not spans:
            raise ConfigError(f"data.messages: no turn of the assistant, so nothing to learn, in {messages!r}")
        return _Rendered(text, spans, add_special_tokens=False)

    def _pair(self, prompt: str, completion: str) -> _Rendered:
        if self.config.chat:
            return self._chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])
        text = prompt + completion
        return _Rendered(text, [(len(prompt), len(text))], add_special_tokens=True)

    def _template(self, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))

    def _prefix_of(self, text: str, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
        prefix = self._template(turns, **options) if turns else ""
        if not text.startswith(prefix):
            raise ConfigError(
                "base: its chat template renders the beginning of a chat differently than the whole chat, so the "
                f"assistant's turns cannot be located: {prefix[-80:]!r} is not in {text[:160]!r}"
            )
        return prefix

    def _encode(self, rendered: _Rendered) -> dict[str, Any]:
        limit, whole = self.config.max_length, self._tokens(rendered)
        return {name: tokens[:limit] for name, tokens in whole.items()} | {"cut": len(whole["input_ids"]) > limit}

    def _tokens(self, rendered: _Rendered) -> dict[str, list[int]]:
        encoded = self.tokenizer(
            rendered.text, add_special_tokens=rendered.add_special_tokens, return_offsets_mapping=True
        )
        ids: list[int] = list(encoded["input_ids"])
        spans = rendered.spans if self.config.completion_only else [(0, len(rendered.text))]
        labels = [
            # A token that crosses the beginning of a span is learned: the model must produce it there.
            token if any(start < last and first < stop for first, last in spans) and stop > start else IGNORED
            for token, (start, stop) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        ending = self.tokenizer.eos_token_id
        if self.config.append_eos and rendered.add_special_tokens and ending is not None and ids[-1:] != [ending]:
            ids.append(ending)
            labels.append(ending)
        return {"input_ids": ids, "labels": labels}


def _shape(config: DataConfig, columns: Sequence[str]) -> Shape:
    asked: dict[Shape, str | None] = {"messages": config.messages, "prompt": config.prompt, "text": config.text}
    given: list[Shape] = [shape for shape, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"data: {' and '.join(given)} are both set; an example is one of them")
    if given:
        if given[0] == "messages" and config.messages not in columns:
            raise ConfigError(f"data.messages: no column {config.messages!r}; the columns are {sorted(columns)}")
        return given[0]
    if "messages" in columns:
        return "messages"
    if {"prompt", "completion"} <= set(columns):
        return "prompt"
    if "text" in columns:
        return "text"
    raise ConfigError(
        "data: set data.text, data.messages, or data.prompt and data.completion; "
        f"none of the usual names is among the columns {sorted(columns)}"
    )
