"""Commonsense questions as a choice among answer words, in the prompts of LLM-Adapters (arXiv 2304.01933).

The training data ends every answer with "the correct answer is answer2" or the like. All words of that sentence but the
last piece are the same for every choice, so the likeliest choice is the likeliest last piece: a classification at one
position, by the model's own output rows. A search by generation, as the paper's script makes it, finds the same choice
unless the model writes something else before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.data import Examples, Split
from experiments.errors import ExperimentError
from experiments.paper.benchmark import read_json

__all__ = ["PIECES", "TESTS", "TRAINED", "questions_split"]

TRAINED = ("ARC-Challenge", "ARC-Easy", "boolq", "openbookqa")
TESTS = (*TRAINED, "piqa", "social_i_qa", "winogrande")
PIECES = ("1", "2", "3", "4", "5", " true", " false")
"""What an answer ends with, each one token; the classes of the classification."""
TRAINING, VALIDATION = 8000, 800
"""Questions of the joint training data, and of what it leaves."""
LONGEST = 224
"""Tokens of a prompt; of longer ones (fewer than 1%) the start is cut, but for the token that begins every text."""
_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ANSWER = "the correct answer is"


def _answer(file: Path, row: dict[str, Any]) -> tuple[str, int, int]:
    """Text between prompt and last piece, the number of the piece, and how many choices the question has.

    Raises:
        ExperimentError: an answer that ends with none of the pieces.
    """
    answer = str(row["answer"])
    if answer in ("true", "false"):
        return _ANSWER, PIECES.index(f" {answer}"), 0
    word, number = answer[:-1], answer[-1]
    choices = sum(f"{word.capitalize()}{digit}:" in row["instruction"] for digit in PIECES[:5])
    if number not in PIECES[:choices]:
        raise ExperimentError(f"{file}: expected an answer that names one of its choices, got {row!r}")
    return f"{_ANSWER} {word}", PIECES.index(number), choices


def _read(file: Path) -> list[dict[str, Any]]:
    wanted = "expected a list of objects with instruction and answer"
    rows = read_json(file, wanted)
    if not isinstance(rows, list) or not rows:
        raise ExperimentError(f"{file}: {wanted}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not {"instruction", "answer"} <= row.keys():
            raise ExperimentError(f"{file}, entry {number}: {wanted}, got {row!r}")
    return rows


def _examples(rows: Sequence[tuple[int, Path, dict[str, Any]]], tokenizer: Any, first: Sequence[int]) -> Examples:
    """The questions of (number of the task, file, row)."""
    answers = [_answer(file, row) for _, file, row in rows]
    texts = [_PROMPT.format(instruction=row["instruction"]) for _, _, row in rows]
    prompts = tokenizer(texts, add_special_tokens=False).input_ids
    ends = {text: tokenizer(text, add_special_tokens=False).input_ids for text in {text for text, _, _ in answers}}
    before = [ends[text] for text, _, _ in answers]
    tokens = [
        [*first, *prompt[len(first) + len(end) - LONGEST :], *end]
        for prompt, end in zip(prompts, before, strict=True)
    ]  # fmt: skip
    lengths = torch.tensor([len(ids) for ids in tokens])
    inputs = torch.zeros(len(tokens), int(lengths.max()), dtype=torch.long)
    choices = torch.zeros(len(tokens), len(PIECES), dtype=torch.bool)
    for index, (ids, (_, _, count)) in enumerate(zip(tokens, answers, strict=True)):
        inputs[index, : len(ids)] = torch.tensor(ids)
        choices[index, slice(0, count) if count else slice(5, 7)] = True
    labels = torch.tensor([label for _, label, _ in answers])
    return Examples(inputs, lengths, labels, torch.tensor([task for task, _, _ in rows]), choices)


def questions_split(folder: Path, tokenizer: Any, first: Sequence[int] = ()) -> Split:
    """Joint training on four tasks; validation on questions of theirs that are left; seven tests.

    Args:
        folder: TASK/train.json and TASK/test.json.
        tokenizer: the model's.
        first: tokens that begin every text of the model.

    Raises:
        ExperimentError: a file is missing or not of the form.
    """
    trained = [
        (TESTS.index(task), folder / task / "train.json", row)
        for task in TRAINED
        for row in _read(folder / task / "train.json")
    ]
    order = np.random.default_rng(0).permutation(len(trained))
    cut = min(TRAINING, len(trained) * 9 // 10)
    parts = [[trained[i] for i in order[:cut]], [trained[i] for i in order[cut : cut + VALIDATION]]]
    parts.append([
        (number, folder / task / "test.json", row)
        for number, task in enumerate(TESTS)
        for row in _read(folder / task / "test.json")
    ])  # fmt: skip
    train, validation, test = (_examples(part, tokenizer, first) for part in parts)
    return Split.of(train, validation, test, tests=TESTS)
