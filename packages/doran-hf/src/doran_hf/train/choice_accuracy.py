"""Accuracy of a causal LM on multiple choice: how often the right completion is the most probable one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from doran_core.errors import ConfigError
from doran_core.support.progress import ProgressBar
from doran_hf.train.text import IGNORED, TextEncoder

__all__ = ["check_choices", "choice_accuracy"]

_BATCH = 32


def check_choices(encoder: TextEncoder, rows: Any) -> None:
    """Refuse examples that :func:`choice_accuracy` would refuse.

    Raises:
        ConfigError: a row whose completion is none of the choices, or a choice that ``data.max_length`` cuts.
    """
    for row in rows:
        _candidates(encoder, row)


@torch.no_grad()
def choice_accuracy(model: Any, encoder: TextEncoder, rows: Any, label: str) -> float:
    """Share of rows whose own completion has the highest log-probability among ``data.choices``.

    Args:
        model: a causal LM.
        encoder: of a configuration with choices.
        rows: raw examples.
        label: for the progress bar.

    Raises:
        ConfigError: a row whose completion is none of the choices, or a choice that ``data.max_length`` cuts.
    """
    inputs: dict[tuple[int, ...], int] = {}  # choices of one token share the prompt, which runs once
    asked: list[list[tuple[int, list[tuple[int, int]]]]] = []
    right = []
    for row in rows:
        place, candidates = _candidates(encoder, row)
        right.append(place)
        asked.append([_question(encoded, inputs) for encoded in candidates])
    wanted: dict[int, set[tuple[int, int]]] = {}
    for question in asked:
        for index, targets in question:
            wanted.setdefault(index, set()).update(targets)
    found = _log_probabilities(model, list(inputs), wanted, label)
    scores = torch.tensor([[sum(found[index, target] for target in targets) for index, targets in q] for q in asked])
    return float((scores.argmax(1) == torch.tensor(right)).double().mean())


def _candidates(encoder: TextEncoder, row: Any) -> tuple[int, list[dict[str, list[int]]]]:
    """The number of the right choice, and the row's prompt with each of the choices."""
    choices = encoder.config.choices or []
    prompt, completion = encoder.pair(row)
    if completion not in choices:
        raise ConfigError(f"data.choices: the completion {completion!r} of an example is not among {choices!r}")
    return choices.index(completion), [encoder.encode_whole_pair(prompt, choice) for choice in choices]


def _question(encoded: dict[str, list[int]], inputs: dict[tuple[int, ...], int]) -> tuple[int, list[tuple[int, int]]]:
    """The input tokens for the model, and the (position, token) pairs whose probabilities count."""
    ids, labels = encoded["input_ids"], encoded["labels"]
    index = inputs.setdefault(tuple(ids[:-1]), len(inputs))
    return index, [(place - 1, token) for place, token in enumerate(labels) if token != IGNORED and place]


def _log_probabilities(
    model: Any, inputs: Sequence[tuple[int, ...]], wanted: dict[int, set[tuple[int, int]]], label: str
) -> dict[tuple[int, tuple[int, int]], float]:
    found = {}
    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
    training = model.training
    model.eval()
    with ProgressBar(label, unit="inputs") as bar:
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            logits = _forward(model, [inputs[index] for index in batch])
            for row, index in enumerate(batch):
                for place, token in wanted[index]:
                    value = logits[row, place].float().log_softmax(0)[token]
                    found[index, (place, token)] = float(value)
            bar(start + len(batch), len(order))
    model.train(training)
    return found


def _forward(model: Any, inputs: Sequence[tuple[int, ...]]) -> Tensor:
    """Logits ``[batch, length, vocabulary]``; shorter inputs are padded on the right, where they do no harm."""
    length = max(map(len, inputs))
    ids = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for tokens in inputs], device=model.device)
    mask = torch.tensor([[1] * len(tokens) + [0] * (length - len(tokens)) for tokens in inputs], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits
