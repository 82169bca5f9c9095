"""The stack of alike layers in a transformer, and a model cut down to a few of them for a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

__all__ = ["KEPT", "LayerStack", "find_layers", "shortened", "structural_signature"]

KEPT = 3
"""Number of traced layers. The first also has the shared nodes; the second and third show what changes from layer to
layer."""

_FEWEST = 6  # tracing fewer layers in full is fast enough


@dataclass(frozen=True)
class LayerStack:
    """The stack of alike layers of a model: its path, e.g. ``model.layers``, and the list itself."""

    path: str
    layers: nn.ModuleList


def find_layers(model: PreTrainedModel) -> LayerStack | None:
    """The one stack of `num_hidden_layers` modules whose members differ only in their weights, or None."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    stacks = [
        LayerStack(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count >= _FEWEST
    ]
    if len(stacks) != 1:
        return None
    signatures = [structural_signature(layer, index) for index, layer in enumerate(stacks[0].layers)]
    return stacks[0] if all(other == signatures[0] for other in signatures) else None


def structural_signature(whole: nn.Module, index: int = -1) -> list[object]:
    """Everything that decides what a layer or a model computes, except its weights and a layer's number `index`."""
    parts: list[object] = []
    for path, module in whole.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if name != "name_or_path"
            and (
                isinstance(value, bool | float | str | tuple | None)
                or (isinstance(value, int) and not (name == "layer_idx" and value == index))
            )
        }
        parts.append((path, type(module), sorted(plain.items())))
    parts += [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in whole.named_parameters()]
    # Buffers are constants of the graph, so they must be equal in value to be shared.
    parts += [(name, tuple(tensor.shape), tensor.flatten().tolist()) for name, tensor in whole.named_buffers()]
    return parts


@contextmanager
def shortened(model: PreTrainedModel, stack: LayerStack) -> Iterator[None]:
    """A context in which the model has only the first `KEPT` layers of its stack."""
    parent = model.get_submodule(stack.path.rpartition(".")[0])
    name = stack.path.rpartition(".")[2]
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    setattr(parent, name, nn.ModuleList(list(stack.layers)[:KEPT]))
    config.num_hidden_layers = KEPT
    try:
        yield
    finally:
        setattr(parent, name, stack.layers)
        config.num_hidden_layers = count
