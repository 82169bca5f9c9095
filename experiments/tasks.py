"""What is learned: a pretrained model, its features, the start of its classifier, and the data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments import digits, dinov2, photos, questions, sources
from experiments.data import Examples, Split
from experiments.errors import ExperimentError

__all__ = ["Task", "load_task", "prepare", "require"]

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
        renamed: what a study's targets are called in this version of transformers, where the name is another.
    """

    model: nn.Module
    features: Features
    head: Callable[[int], tuple[Tensor, Tensor]]
    split: Split
    renamed: Mapping[str, str] = field(default_factory=dict)


def require(name: str, data: Path | None = None) -> None:
    """See that the packages of a model and its data are there, without loading them.

    Args:
        name: of a task; "dinov2/flowers5" is a model and a folder of the data.
        data: the folder of such folders.

    Raises:
        ExperimentError: an unknown name, a Python package that is not installed, or data that are not there.
    """
    model, _, folder = name.partition("/")
    if model not in (_ON_FOLDERS if folder else _TASKS):
        known = [*_TASKS, *(f"{model}/FOLDER" for model in _ON_FOLDERS)]
        raise ExperimentError(f"unknown model {name!r}; known are {sorted(known)}")
    for find in _SOURCES[model]:
        find()
    if folder and (data is None or not (data / folder).is_dir()):
        where = f"{data / folder}: no such directory" if data else f"{name} is trained on data of yours"
        raise ExperimentError(f"{where}; --data DIR names the folder that holds {folder!r}")


def prepare(names: Collection[str], cache: Path) -> None:
    """Put the models that these tasks keep in ``cache`` there, if they are not: processes that share it would race."""
    models = {name.partition("/")[0] for name in names}
    if "vit" in models:
        digits.pretrained_vit(cache)
    if models & {"dinov2", "random_vit"}:
        dinov2.load_dinov2(sources.dinov2_file(), cache)


def load_task(name: str, cache: Path, data: Path | None = None) -> Task:
    """The task of a model; ``cache`` keeps what has to be pretrained first. Arguments as of :func:`require`.

    Raises:
        ExperimentError: as :func:`require`, or data of another form.
    """
    require(name, data)
    model, _, folder = name.partition("/")
    task = _ON_FOLDERS[model](cache, data / folder) if data and folder else _TASKS[model](cache)
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
    model, tokenizer = _gguf(sources.smollm2_file())
    answers = [tokenizer(text, add_special_tokens=False).input_ids[0] for text in (" negative", " positive")]
    rows = model.get_output_embeddings().weight[answers].detach().clone()
    texts, labels = sources.reviews("rotten_tomatoes")
    end = tokenizer("\nSentiment:", add_special_tokens=False).input_ids
    reviews = tokenizer([f"Review: {text.strip()}" for text in texts]).input_ids
    tokens = [[*review[: LONGEST - len(end)], *end] for review in reviews]

    def head(seed: int) -> tuple[Tensor, Tensor]:
        return rows.clone(), torch.zeros(2)

    return Task(model.model, _last_token, head, _text_split(tokens, labels))


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


def _photos(load: Callable[[Path, Path], nn.Module]) -> Callable[[Path, Path], Task]:
    """Classes of photos; features are those of the class token."""

    def task(cache: Path, folder: Path) -> Task:
        model: Any = load(sources.dinov2_file(), cache)
        split = photos.photo_split(folder)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dinov2.IMAGE_MEAN, dinov2.IMAGE_STD))

        def features(model: nn.Module, inputs: Tensor, lengths: Tensor | None) -> Tensor:
            pixels = (inputs / 255.0 - mean.to(inputs.device)) / std.to(inputs.device)
            hidden: Tensor = model(pixel_values=pixels).last_hidden_state[:, 0]
            return hidden

        classes = int(split.train.labels.max()) + 1
        head = _random_head(classes, model.config.hidden_size)
        return Task(model, features, head, split, dinov2.renamed_layers(model))

    return task


def _questions(find: Callable[[], Path], *, begins: bool = False) -> Callable[[Path, Path], Task]:
    """Commonsense questions; the classifier starts as the output rows of the answers' last tokens.

    Args:
        find: the model's GGUF file.
        begins: every text begins with the tokenizer's token for that. Gemma's file asks for it; transformers (5.17,
            5.19) leaves it out when it reads the file, and the model predicts much worse without.
    """

    def task(cache: Path, folder: Path) -> Task:
        model, tokenizer = _gguf(find())
        pieces = [tokenizer(text, add_special_tokens=False).input_ids for text in questions.PIECES]
        if any(len(ids) != 1 for ids in pieces):
            raise ExperimentError(
                f"{find()}: expected a tokenizer with one token for each of {questions.PIECES}, got {pieces} "
                "(transformers 5.17 reads the tokenizer in Gemma's file wrongly; 5.19 reads it rightly)"
            )
        rows = model.get_output_embeddings().weight[[ids[0] for ids in pieces]].detach().clone()

        def head(seed: int) -> tuple[Tensor, Tensor]:
            return rows.clone(), torch.zeros(len(rows))

        first = [tokenizer.bos_token_id] if begins else []
        return Task(model.model, _last_token_in_bfloat16, head, questions.questions_split(folder, tokenizer, first))

    return task


def _gguf(file: Path) -> tuple[Any, Any]:
    """Causal language model and tokenizer of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _last_token(model: nn.Module, inputs: Tensor, lengths: Tensor | None) -> Tensor:
    """The last token's features. Padding stands behind the text, where causal attention does not look."""
    assert lengths is not None
    hidden: Tensor = model(input_ids=inputs, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(inputs), device=inputs.device), lengths - 1]


def _last_token_in_bfloat16(model: nn.Module, inputs: Tensor, lengths: Tensor | None) -> Tensor:
    """The same with products in bfloat16 on a GPU, as this benchmark is usually trained; weights stay float32."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
        return _last_token(model, inputs, lengths)


_SOURCES: dict[str, tuple[Callable[[], Path], ...]] = {
    "minilm": (sources.minilm_folder, sources.reviews_file),
    "smollm2": (sources.smollm2_file, sources.reviews_file),
    "vit": (),
    "dinov2": (sources.dinov2_file,),
    "random_vit": (sources.dinov2_file,),
    "gemma3": (sources.gemma3_file,),
}
_TASKS: dict[str, Callable[[Path], Task]] = {"minilm": _minilm, "smollm2": _smollm2, "vit": _vit}
_ON_FOLDERS: dict[str, Callable[[Path, Path], Task]] = {
    "dinov2": _photos(dinov2.load_dinov2),
    "random_vit": _photos(dinov2.random_dinov2),
    "smollm2": _questions(sources.smollm2_file),
    "gemma3": _questions(sources.gemma3_file, begins=True),
}
"""Models that are adapted to data in a folder of the user's."""
