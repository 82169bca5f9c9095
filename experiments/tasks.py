"""What is learned: a pretrained model, its features, the start of its classifier, and the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments import digits, sources
from experiments.data import Examples, Split
from experiments.errors import ExperimentError

__all__ = ["Task", "load_task", "require"]

Features = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
"""From model, inputs and lengths to features ``[N, d]``."""

VALIDATION, TEST = 1000, 1500
LONGEST = 64
"""Tokens of a text; what is longer is cut. 1.5% of the Rotten Tomatoes sentences are."""


@dataclass(frozen=True)
class Task:
    """A transfer problem.

    Attributes:
        model: the pretrained model, frozen, in float32 on the CPU.
        features: what it makes of inputs.
        head: the classifier's start for a seed: weight ``[classes, d]`` and bias ``[classes]``.
        split: the data.
    """

    model: nn.Module
    features: Features
    head: Callable[[int], tuple[Tensor, Tensor]]
    split: Split


def require(name: str) -> None:
    """See that the packages of a model and its data are there, without loading them.

    Raises:
        ExperimentError: an unknown name, or a Python package that is not installed.
    """
    if name not in _TASKS:
        raise ExperimentError(f"unknown model {name!r}; known are {sorted(_TASKS)}")
    for find in _SOURCES[name]:
        find()


def load_task(name: str, cache: Path) -> Task:
    """The task of a model; ``cache`` keeps what has to be pretrained first.

    Raises:
        ExperimentError: an unknown name, or a Python package that is not installed.
    """
    require(name)
    task = _TASKS[name](cache)
    task.model.requires_grad_(False).eval()
    return task


def _random_head(classes: int, width: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Transformers' start of a classifier: N(0, 0.02^2), bias 0."""

    def start(seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        return 0.02 * torch.randn(classes, width, generator=random), torch.zeros(classes)

    return start


def _minilm(cache: Path) -> Task:
    """Sentiment of Rotten Tomatoes sentences; features are the mean over a sentence's tokens."""
    from transformers import AutoModel, AutoTokenizer

    folder = sources.minilm_folder()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, labels = sources.reviews("rotten_tomatoes")
    tokens = tokenizer(texts, truncation=True, max_length=LONGEST).input_ids

    def features(model: nn.Module, inputs: Tensor, lengths: Tensor | None) -> Tensor:
        assert lengths is not None
        mask = torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]
        hidden: Tensor = model(input_ids=inputs, attention_mask=mask.long()).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / lengths[:, None]

    return Task(model, features, _random_head(2, model.config.hidden_size), _text_split(tokens, labels))


def _smollm2(cache: Path) -> Task:
    """The same, asked as a prompt; the classifier starts as the output rows of " negative" and " positive"."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = sources.smollm2_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    answers = [tokenizer(text, add_special_tokens=False).input_ids[0] for text in (" negative", " positive")]
    rows = model.get_output_embeddings().weight[answers].detach().clone()
    texts, labels = sources.reviews("rotten_tomatoes")
    end = tokenizer("\nSentiment:", add_special_tokens=False).input_ids
    reviews = tokenizer([f"Review: {text.strip()}" for text in texts]).input_ids
    tokens = [[*review[: LONGEST - len(end)], *end] for review in reviews]

    def features(model: nn.Module, inputs: Tensor, lengths: Tensor | None) -> Tensor:
        assert lengths is not None
        # Padding stands behind the text, where causal attention does not look.
        hidden: Tensor = model(input_ids=inputs, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(inputs), device=inputs.device), lengths - 1]

    def head(seed: int) -> tuple[Tensor, Tensor]:
        return rows.clone(), torch.zeros(2)

    return Task(model.model, features, head, _text_split(tokens, labels))


def _text_split(tokens: list[list[int]], labels: list[int]) -> Split:
    held_out = VALIDATION + TEST
    parts = (slice(held_out, None), slice(0, VALIDATION), slice(VALIDATION, held_out))
    return Split.of(*(_padded(tokens[part], labels[part]) for part in parts))


def _padded(tokens: list[list[int]], labels: list[int]) -> Examples:
    lengths = torch.tensor([len(ids) for ids in tokens])
    inputs = torch.zeros(len(tokens), int(lengths.max()), dtype=torch.long)
    for row, ids in zip(inputs, tokens, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return Examples(inputs, lengths, torch.tensor(labels))


def _vit(cache: Path) -> Task:
    """Handwritten digits, for a ViT that has seen printed letters; features are those of the class token."""
    model = digits.pretrained_vit(cache)

    def features(model: nn.Module, inputs: Tensor, lengths: Tensor | None) -> Tensor:
        hidden: Tensor = model(pixel_values=inputs).last_hidden_state[:, 0]
        return hidden

    return Task(model, features, _random_head(10, model.config.hidden_size), digits.digits_split())


_SOURCES: dict[str, tuple[Callable[[], Path], ...]] = {
    "minilm": (sources.minilm_folder, sources.reviews_file),
    "smollm2": (sources.smollm2_file, sources.reviews_file),
    "vit": (),
}
_TASKS: dict[str, Callable[[Path], Task]] = {"minilm": _minilm, "smollm2": _smollm2, "vit": _vit}
