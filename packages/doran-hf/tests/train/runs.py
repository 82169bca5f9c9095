"""A small run of `doran train`: its rows, its configuration, and the call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_bases import save_text_base

from doran_hf.train import load_config, train

ROWS = [
    {"text": f"{letter} {number}", "sentiment": "positive" if letter in "abc" else "negative"}
    for number in range(8)
    for letter in "abcdef"
]


def write_rows(file: str, rows: list[dict[str, Any]] = ROWS) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def settings(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "base": str(save_text_base(Path("base"))),
        "output": "run",
        "data.train": write_rows("train.jsonl"),
        "data.eval": write_rows("test.jsonl", ROWS[::5]),
        "data.prompt": "Review: {text} Sentiment:",
        "data.completion": " {sentiment}",
        "data.choices": [" positive", " negative"],
        "data.append_eos": False,
        "adapter.rank": 4,
        "trainer.max_steps": 30,
        "trainer.learning_rate": 2e-2,
        "trainer.logging_steps": 5,
        "trainer.save_steps": 10,
        "trainer.disable_tqdm": True,
        "trainer.use_cpu": True,
    }
    return values | {name.replace("__", "."): value for name, value in changes.items()}


def as_flags(values: dict[str, Any]) -> list[str]:
    return [
        text
        for name, value in values.items()
        for text in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]


def run(**changes: Any) -> dict[str, Any]:
    return train(load_config(None, {k: v for k, v in settings(**changes).items() if v != "unset"}))
