"""Commonsense reasoning in LLM-Adapters' form (arXiv 2304.01933): one training set, eight tests, answers in words.

    DIR/commonsense_170k.json    a list of {"instruction", "input", "output", "answer"}
    DIR/boolq/test.json          the same; the answer is one of the task's words

A model is scored by the first of these words in what it writes after the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.errors import ExperimentError
from experiments.paper.benchmark import Lack, read_json

__all__ = ["TRAINING_FILE", "Commonsense", "find_answer", "write_answers"]

TRAINING_FILE = "commonsense_170k.json"
TRAINING_SIZE = 170_420
_CHOICES = [f"answer{number}" for number in range(1, 6)]
ANSWERS = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": _CHOICES,
    "hellaswag": [f"ending{number}" for number in range(1, 5)],
    "winogrande": ["option1", "option2"],
    "ARC-Easy": _CHOICES,
    "ARC-Challenge": _CHOICES,
    "openbookqa": _CHOICES,
}
"""Words that answers are made of, by task."""
TEST_SIZES = {"boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "hellaswag": 10042, "winogrande": 1267,
              "ARC-Easy": 2376, "ARC-Challenge": 1172, "openbookqa": 500}  # fmt: skip
_FIELDS = ("instruction", "output", "answer")


class Commonsense:
    """Eight tests after one training."""

    groups: Mapping[str, tuple[str, ...]] = {"commonsense": tuple(ANSWERS)}

    def training_rows(self, folder: Path) -> list[dict[str, str]]:
        """The examples to train on.

        Raises:
            ExperimentError: the file is not there or not of the form.
        """
        return _read(folder / TRAINING_FILE)

    def test_rows(self, folder: Path, task: str) -> list[dict[str, str]]:
        """The examples of a test.

        Raises:
            ExperimentError: the file is not there or not of the form, or an answer is none of the task's words.
        """
        file = folder / task / "test.json"
        rows = _read(file)
        for number, row in enumerate(rows):
            if row["answer"] not in ANSWERS[task]:
                raise ExperimentError(
                    f"{file}, entry {number}: expected an answer among {ANSWERS[task]}, got {row['answer']!r}"
                )
        return rows

    def lacks(self, folder: Path, tasks: tuple[str, ...]) -> list[Lack]:
        """What the folder lacks for the training and these tests."""
        lacks = _part_lacks(TRAINING_FILE, lambda: self.training_rows(folder), TRAINING_SIZE)
        for task in tasks:
            lacks += _part_lacks(task, partial(self.test_rows, folder, task), TEST_SIZES[task])
        return lacks


def _part_lacks(name: str, read: Callable[[], list[dict[str, str]]], size: int) -> list[Lack]:
    try:
        found = len(read())
    except ExperimentError as error:
        return [Lack(str(error))]
    return [] if found == size else [Lack(f"{name}: {found:,} examples, expected {size:,}", partial=True)]


def _read(file: Path) -> list[dict[str, str]]:
    wanted = f"expected a list of objects with {', '.join(_FIELDS)}"
    rows = read_json(file, wanted)
    if not isinstance(rows, list) or not rows:
        raise ExperimentError(f"{file}: {wanted}, got {type(rows).__name__} of {len(rows)} entries")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in _FIELDS):
            raise ExperimentError(f"{file}, entry {number}: {wanted}, got {row!r}")
    return [{name: row[name] for name in _FIELDS} for row in rows]


def find_answer(task: str, written: str) -> str | None:
    """The first of the task's words in a text, or None."""
    found = re.search("|".join(ANSWERS[task]), written.lower())
    return None if found is None else found.group()


@torch.inference_mode()
def write_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int, beams: int, batch: int
) -> list[str]:
    """What a causal LM writes after each prompt, the likeliest by beam search.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer, with a padding token.
        prompts: texts.
        new_tokens: most tokens to write.
        beams: of the search; 1 takes the likeliest token each time.
        batch: prompts at a time; those of like length go together.
    """
    written = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        encoded = tokenizer(
            [prompts[index] for index in chosen], return_tensors="pt", padding=True, padding_side="left"
        )
        inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
        output = model.generate(
            **inputs, max_new_tokens=new_tokens, num_beams=beams, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            written[index] = text
    return written
