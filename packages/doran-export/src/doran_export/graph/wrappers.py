"""Models as pure functions of tensors: what torch.export traces. Nothing of transformers is patched.

Pixel inputs, and all outputs except the cache, are float32 for every dtype of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from doran_export.adapters.adapted_model import take_adapters
from doran_export.graph.spec import GraphSpec, cache_name

__all__ = ["eager_attention", "example_inputs", "mean_embedding", "wrap"]

_RANK = 7  # of the adapters while tracing


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """A context in which a model computes attention as plain products and a softmax under a finite mask.

    The trace needs this. torch's fused attention becomes a mask of minus infinity, whose softmax is NaN for a row
    without visible tokens (left padding), and NaN spreads to the next layers.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class GivenLayer(DynamicLayer):
    """A cache layer that starts from given tensors, possibly of length 0, instead of from nothing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Length of the past. Unlike the parent's method, it has no branch on an empty tensor, so tracing covers both
        cases."""
        length: int = self.keys.shape[-2]
        return length


class _Function(nn.Module):
    """Holds the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model


class DecoderFunction(_Function):
    """(tokens, mask, positions, past) -> (logits [batch, sequence, vocabulary], present)."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list[Tensor]
    ) -> tuple[Tensor, ...]:
        pairs = zip(past_key_values[::2], past_key_values[1::2], strict=True)
        cache = Cache(layers=[GivenLayer(keys, values) for keys, values in pairs])
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{cache_name(self.model): cache},
        )
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (output.logits.float(), *present)


class TextFunction(_Function):
    """(text) -> (logits,)."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return (self.model(**_present(input_ids, attention_mask, token_type_ids)).logits.float(),)


class EmbeddingFunction(_Function):
    """(text) -> (last hidden state [batch, sequence, hidden], its mean over real tokens at unit length)."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        hidden = self.model(**_present(input_ids, attention_mask, token_type_ids)).last_hidden_state.float()
        return hidden, mean_embedding(hidden, attention_mask)


class ImageFunction(_Function):
    """(image [batch, channels, height, width]) -> (logits,)."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (self.model(pixel_values=pixel_values.to(self.model.dtype)).logits.float(),)


def _present(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> dict[str, Tensor]:
    """Arguments for a model. Token types only if the graph has them, because some models do not take them."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return inputs if token_type_ids is None else inputs | {"token_type_ids": token_type_ids}


def mean_embedding(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Sentence embedding [batch, hidden] of unit length: the mean of the hidden states of the real tokens."""
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
    return nn.functional.normalize(mean, dim=-1)


def wrap(model: PreTrainedModel, spec: GraphSpec) -> nn.Module:
    """The function of a model that takes `spec.inputs` and returns `spec.outputs`, in their order."""
    kind: type[_Function]
    if spec.task.has_cache:
        kind = DecoderFunction
    elif spec.task.name == "feature-extraction":
        kind = EmbeddingFunction
    else:
        kind = TextFunction if spec.task.reads == "text" else ImageFunction
    function = kind(model)
    return (take_adapters(function, model, spec) if spec.adapted else function).eval()


def example_inputs(spec: GraphSpec, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments to trace `wrap(...)` with, and their dynamic shapes in the form of torch.export.

    The lengths differ from each other and from 1, so that tracing cannot take one axis for another.
    """
    sizes = {"batch": 2, "sequence": 5, "past_sequence": 3, "total_sequence": 8}
    of_adapters = set(spec.adapter_inputs)
    arguments: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    adapters: list[tuple[Tensor, dict[int, Any]]] = []
    for name, axes in spec.inputs.items():
        shape = [sizes.get(axis, _RANK) if isinstance(axis, str) else axis for axis in axes]
        # DYNAMIC without names: models bound their lengths, and a named axis would have to state that bound.
        dynamic = {index: torch.export.Dim.DYNAMIC for index, axis in enumerate(axes) if isinstance(axis, str)}
        if name.startswith("past_key_values."):
            arguments.setdefault("past_key_values", []).append(torch.zeros(shape, dtype=dtype))
            shapes.setdefault("past_key_values", []).append(dynamic)
        elif name in of_adapters:
            given = torch.float32 if name.endswith(".scale") else dtype
            adapters.append((torch.zeros(shape, dtype=given), dynamic))
        else:
            arguments[name] = torch.zeros(shape) if name == "pixel_values" else torch.ones(shape, dtype=torch.int64)
            shapes[name] = dynamic
    if not adapters:
        return arguments, shapes
    tensors, dynamic_axes = zip(*adapters, strict=True)
    return (
        {"inputs": arguments, "adapters": list(tensors)},
        {"inputs": shapes, "adapters": list(dynamic_axes)},
    )
