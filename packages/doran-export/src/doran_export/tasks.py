"""The kinds of models that can be exported: one record each, found by the name of the architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from doran_core.errors import ConfigError
from doran_export.errors import UnsupportedModelError

__all__ = ["TASKS", "Task", "task_for"]


@dataclass(frozen=True)
class Task:
    """One kind of model.

    Attributes:
        name: the name that users give, as on model hubs.
        auto_class: the transformers class that loads it.
        suffixes: how the names of its architectures end.
        reads: its main input.
        outputs: the graph's outputs (a decoder's cache comes after them).
        per_token: whether the first output has one row per token, so that padding is left out of a comparison.
    """

    name: str
    auto_class: str
    suffixes: tuple[str, ...]
    reads: Literal["text", "image"]
    outputs: tuple[str, ...]
    per_token: bool

    @property
    def main_input(self) -> str:
        """Name of the main input, as transformers' `main_input_name`."""
        return "input_ids" if self.reads == "text" else "pixel_values"

    @property
    def has_cache(self) -> bool:
        """Whether the model generates with a key-value cache."""
        return self.name == "text-generation"


_RECORDS = (
    Task("text-generation", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), "text", ("logits",), True),
    Task(
        "text-classification",
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
        "text",
        ("logits",),
        False,
    ),
    Task(
        "token-classification",
        "AutoModelForTokenClassification",
        ("ForTokenClassification",),
        "text",
        ("logits",),
        True,
    ),
    Task("fill-mask", "AutoModelForMaskedLM", ("ForMaskedLM",), "text", ("logits",), True),
    Task(
        "image-classification",
        "AutoModelForImageClassification",
        ("ForImageClassification",),
        "image",
        ("logits",),
        False,
    ),
    Task("feature-extraction", "AutoModel", ("Model",), "text", ("last_hidden_state", "sentence_embedding"), True),
)

TASKS: dict[str, Task] = {task.name: task for task in _RECORDS}
"""Every kind by name."""


def task_for(architecture: str | None, requested: str | None, *, where: str) -> Task:
    """The kind of a model: the requested one, or the one of its architecture's name.

    Args:
        architecture: first entry of `architectures` in config.json, e.g. ``"LlamaForCausalLM"``.
        requested: a name of `TASKS`, or None.
        where: the file or directory, for the message.

    Raises:
        ConfigError: `requested` is not a known name.
        UnsupportedModelError: the architecture belongs to no kind, or is not given.
    """
    if requested is not None:
        if requested not in TASKS:
            raise ConfigError(f"task {requested!r} is not known: expected one of {', '.join(TASKS)}")
        return TASKS[requested]
    if architecture is None:
        raise UnsupportedModelError(f"{where} names no architecture: say which task it is ({', '.join(TASKS)})")
    for task in _RECORDS:
        if architecture.endswith(task.suffixes):
            return task
    known = ", ".join(suffix for task in _RECORDS for suffix in task.suffixes)
    raise UnsupportedModelError(
        f"architecture {architecture} of {where} is not supported: expected a name ending in {known}"
    )
