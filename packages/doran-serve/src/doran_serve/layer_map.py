"""Maps projections of the checkpoint to a vLLM model: the layer, the rows in it, the name. No vLLM here.

vLLM packs projections with the same input (q, k, v; gate, up) into one layer, and shards layers over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from doran_serve.records import ServedModule

__all__ = ["Place", "nearest", "output_sizes", "place_name", "places_of", "renamer"]


@dataclass(frozen=True)
class Place:
    """One projection on this rank.

    Attributes:
        layer: vLLM's linear layer.
        rows: its rows in the layer's weight.
        outputs: their indices among the checkpoint's rows.
        inputs: this rank's columns of the checkpoint.
        shape: `[d_out, d_in]` in the checkpoint.
    """

    layer: Any
    rows: slice
    outputs: slice
    inputs: slice
    shape: tuple[int, int]


def output_sizes(layer: Any) -> list[int]:
    """Unsharded output sizes `[d_out_i]` of the projections in a vLLM linear layer."""
    if hasattr(layer, "total_num_kv_heads"):  # output_sizes counts replicated heads
        q = layer.total_num_heads * layer.head_size
        k = layer.total_num_kv_heads * layer.head_size
        return [q, k, layer.total_num_kv_heads * getattr(layer, "v_head_size", layer.head_size)]
    return list(getattr(layer, "output_sizes", None) or [layer.output_size])


def renamer(model: torch.nn.Module, parse: Any) -> Callable[[str], str]:
    """Map the checkpoint's module names to vLLM's, with the model's mapping and vLLM's parser."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:  # 0.25 and 0.32 have different names for the variant without fused projections
        variant = getattr(mapper, "get_rename_mapper", None) or mapper.get_unstacked_mapper
        mapper = variant()
    return lambda name: str(parse(f"base_model.model.{name}.lora_A.weight", mapper)[0])


def place_name(module: ServedModule, rename: Callable[[str], str], places: Container[str]) -> str:
    """vLLM's name for an adapted layer.

    vLLM's mapping is made for the names in checkpoints, so it gets the stored name first.

    Args:
        module: the layer.
        rename: from :func:`renamer`.
        places: the names of vLLM's layers; embedding models are adapted without their wrapper `model`.

    Returns:
        The name in `places`; if there is none, vLLM's name for the stored one.
    """
    names = [rename(name) for name in (module.stored_name, module.name)]
    return next((full for name in names for full in (name, f"model.{name}") if full in places), names[0])


def nearest(name: str, places: Any) -> str:
    """The nearest names, as the end of a message about a missing module."""
    near = get_close_matches(name, places, n=3)
    return f"; nearest: {', '.join(near)}" if near else ""


def places_of(model: torch.nn.Module, linear: type) -> dict[str, Place]:
    """The place of every projection in a model without LoRA layers, by vLLM's name.

    Args:
        model: vLLM's.
        linear: vLLM's base class of linear layers.
    """
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    places: dict[str, Place] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, linear):
            prefix, _, last = name.rpartition(".")
            names = [f"{prefix}.{part}".lstrip(".") for part in packed.get(last, [last])]
            sizes = output_sizes(layer)
            if len(names) == 1:
                sizes = [sum(sizes)]
            if len(names) == len(sizes):
                places |= dict(zip(names, _split(layer, sizes), strict=True))
    return places


def _split(layer: Any, sizes: list[int]) -> list[Place]:
    rank, ranks = layer.tp_rank, layer.tp_size
    inputs = slice(0, layer.input_size)
    if hasattr(layer, "input_is_parallel"):  # sharded along the input; every rank has all rows
        width = layer.input_size_per_partition
        inputs = slice(rank * width, (rank + 1) * width)
        ranks = 1
    places, start = [], 0
    for index, size in enumerate(sizes):
        # If there are more ranks than key-value heads, ranks share heads.
        copies = layer.num_kv_head_replicas if index and hasattr(layer, "num_kv_head_replicas") else 1
        rows = size * copies // ranks
        first = rank // copies * rows if ranks > 1 else 0
        places.append(
            Place(layer, slice(start, start + rows), slice(first, first + rows), inputs, (size, layer.input_size))
        )
        start += rows
    return places
