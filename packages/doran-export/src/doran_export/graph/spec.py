"""The inputs and outputs of a graph: names, axes, and the shape of a decoder's cache."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from doran_export.errors import UnsupportedModelError
from doran_export.files import read_json
from doran_export.tasks import Task

__all__ = ["CacheSpec", "GraphSpec", "cache_name", "make_spec"]

Axis: TypeAlias = str | int


@dataclass(frozen=True)
class CacheSpec:
    """Shapes of a decoder's cache, per layer: (heads, head size) of the keys and of the values."""

    keys: tuple[tuple[int, int], ...]
    values: tuple[tuple[int, int], ...]

    def names(self, prefix: str) -> list[str]:
        """Tensor names in the order of the graph, e.g. ``past_key_values.0.key``, ``past_key_values.0.value``."""
        return [f"{prefix}.{layer}.{part}" for layer in range(len(self.keys)) for part in ("key", "value")]

    def shapes(self) -> list[tuple[int, int]]:
        """(heads, head size) in the order of `names`."""
        return [shape for pair in zip(self.keys, self.values, strict=True) for shape in pair]


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of one graph, each with its axes: a name for a dynamic axis, a number for a fixed one.

    `adapted` holds (d_in, d_out) of the layers whose adapters are inputs, by module name; their inputs come last.
    """

    task: Task
    inputs: dict[str, tuple[Axis, ...]]
    outputs: dict[str, tuple[Axis | None, ...]]
    cache: CacheSpec | None
    vocabulary: int
    pad_token: int
    max_length: int
    adapted: dict[str, tuple[int, int]] = field(default_factory=dict)

    def with_adapters(self, targets: Mapping[str, tuple[int, int]]) -> GraphSpec:
        """A copy with adapter inputs for these layers, given as (d_in, d_out). Each rank is an axis."""
        inputs = dict(self.inputs)
        for name, (d_in, d_out) in targets.items():
            rank = f"{name}.rank"
            inputs |= {f"{name}.lora_A": (d_in, rank), f"{name}.lora_B": (rank, d_out), f"{name}.scale": (d_out,)}
        return replace(self, inputs=inputs, adapted=dict(targets))

    @property
    def adapter_inputs(self) -> list[str]:
        """Names of the adapter inputs."""
        return list(self.inputs)[len(self.inputs) - 3 * len(self.adapted) :]

    def with_layers(self, count: int, path: str) -> GraphSpec:
        """A copy with cache and adapters of only the first layers of the stack at `path`."""
        number = re.compile(rf"(?:{re.escape(path)}|^past_key_values|^present)\.(\d+)\.")

        def stays(name: str) -> bool:
            found = number.search(f"{name}.")
            return found is None or int(found[1]) < count

        return replace(
            self,
            inputs={name: axes for name, axes in self.inputs.items() if stays(name)},
            outputs={name: axes for name, axes in self.outputs.items() if stays(name)},
            cache=self.cache and CacheSpec(self.cache.keys[:count], self.cache.values[:count]),
            adapted={name: sizes for name, sizes in self.adapted.items() if stays(name)},
        )


def make_spec(model: PreTrainedModel, task: Task, directory: Path) -> GraphSpec:
    """Derive the graph's inputs and outputs from a loaded model.

    Args:
        model: the model, in float32 on the CPU.
        task: its kind.
        directory: the model's directory, for the image size in its preprocessor_config.json.

    Raises:
        UnsupportedModelError: the model's state is not a plain key-value cache, or its image size is unknown.
    """
    if task.reads == "image":
        return _image_spec(model, task, directory)
    config = model.config.get_text_config()
    inputs: dict[str, tuple[Axis, ...]] = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
    outputs: dict[str, tuple[Axis | None, ...]] = {name: _output_axes(name, task) for name in task.outputs}
    cache = None
    if task.has_cache:
        cache = _probe_cache(model)
        inputs |= {"attention_mask": ("batch", "total_sequence"), "position_ids": ("batch", "sequence")}
        for prefix, container, length in (
            ("past_key_values", inputs, "past_sequence"),
            ("present", outputs, "total_sequence"),
        ):
            for name, (heads, size) in zip(cache.names(prefix), cache.shapes(), strict=True):
                container[name] = ("batch", heads, length, size)
    elif _reads_token_types(model):
        inputs["token_type_ids"] = ("batch", "sequence")
    pad = config.pad_token_id
    longest = int(getattr(config, "max_position_embeddings", 0) or 512)
    if config.model_type in _OFFSET_POSITIONS and pad is not None:
        longest -= int(pad) + 1
    return GraphSpec(task, inputs, outputs, cache, int(config.vocab_size), int(pad if pad is not None else 0), longest)


# These models count positions from pad_token_id + 1, so the first rows of the position table are unused.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm")


def _output_axes(name: str, task: Task) -> tuple[Axis | None, ...]:
    if name == "sentence_embedding" or not task.per_token:
        return ("batch", None)
    return ("batch", "sequence", None)


def _reads_token_types(model: PreTrainedModel) -> bool:
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return takes and int(getattr(model.config, "type_vocab_size", 0) or 0) > 1


def cache_name(model: PreTrainedModel) -> str:
    """A decoder's name for its cache, as an argument and in its output: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _probe_cache(model: PreTrainedModel) -> CacheSpec:
    """Run one token through the model and read the shapes of its cache."""
    with torch.inference_mode():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    cache = output.get(cache_name(model))
    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(layer, DynamicLayer) for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers or ()})) or "another kind"
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps a state of {kinds}: only plain key-value caches are supported"
        )
    return CacheSpec(
        tuple((layer.keys.shape[1], layer.keys.shape[3]) for layer in layers),
        tuple((layer.values.shape[1], layer.values.shape[3]) for layer in layers),
    )


def _image_spec(model: PreTrainedModel, task: Task, directory: Path) -> GraphSpec:
    channels = int(getattr(model.config, "num_channels", 3))
    height, width = _image_size(model, directory)
    return GraphSpec(
        task,
        {"pixel_values": ("batch", channels, height, width)},
        dict.fromkeys(task.outputs, ("batch", None)),
        cache=None,
        vocabulary=0,
        pad_token=0,
        max_length=0,
    )


def _image_size(model: PreTrainedModel, directory: Path) -> tuple[int, int]:
    size = getattr(model.config, "image_size", None)
    if size is None:
        processor = read_json(directory / "preprocessor_config.json")
        size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise UnsupportedModelError(
            f"the image size of {directory} is in neither config.json (image_size) nor preprocessor_config.json (size)"
        )
    return int(size[0]), int(size[1])
