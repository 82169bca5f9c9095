"""Which adapted layers share a trunk: names to blocks, blocks to sharing groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from doran_core.method.config import DoranConfig
from doran_core.method.factors import BlockEmbedding, FactorTrunk, GeneratedFactors, LayerSpec
from doran_core.support.patterns import name_pattern

__all__ = ["BLOCK_EMBEDDING", "TRUNK", "SharedTrunks", "block_of", "shared_parts", "sharing_group", "with_shared"]

TRUNK = "factors.trunk."
"""Prefix of the names of a group's shared tensors, in a layer's tensors."""
BLOCK_EMBEDDING = "factors.block_embedding."
"""Prefix of the name of a block's embedding, with ``sharing="model"``."""

_T = TypeVar("_T")

_LAST_NUMBER = re.compile(r"(.*\.|)\d+(?=\.)")


def block_of(name: str, pattern: str | None = None) -> str:
    """The block of a module, by its name.

    ``model.layers.3.self_attn.q_proj`` -> ``model.layers.3``; a name without a number inside -> ``""``.

    Args:
        name: the module's full name.
        pattern: a regex that finds the block: its first group if it has one, else the whole match.
    """
    if pattern:
        return name_pattern(pattern).find(name) or ""
    match = _LAST_NUMBER.match(name)
    return match[0] if match else ""


def sharing_group(name: str, config: DoranConfig) -> tuple[str, int]:
    """The key of a layer's sharing group, from its name only."""
    return _group(config, name, block_of(name, config.block_pattern), config.rank_for(name))


def _group(config: DoranConfig, name: str, block: str, rank: int) -> tuple[str, int]:
    """The key of a layer's sharing group. Layers of different ranks form separate groups, because embeddings have r
    rows."""
    return {"block": block, "model": "", "none": name}[config.sharing], rank


def shared_parts(config: DoranConfig) -> dict[str, Callable[[str], object]]:
    """For each prefix of shared tensors, the function from a layer's name to its group."""
    return {
        TRUNK: lambda layer: sharing_group(layer, config),
        BLOCK_EMBEDDING: lambda layer: block_of(layer, config.block_pattern),
    }


def with_shared(tensors: Mapping[str, Mapping[str, _T]], config: DoranConfig) -> dict[str, dict[str, _T]]:
    """Each layer's saved tensors together with those of its shared networks, which a file holds under one layer only.

    Args:
        tensors: by layer, then by name. Any layer of a group may hold the group's shared tensors.
        config: the options that decide the groups.
    """
    full = {layer: dict(parts) for layer, parts in tensors.items()}
    for start, group_of in shared_parts(config).items():
        shared: dict[object, dict[str, _T]] = {}
        for layer, parts in tensors.items():
            own = {name: tensor for name, tensor in parts.items() if name.startswith(start)}
            shared.setdefault(group_of(layer), {}).update(own)
        for layer in full:
            full[layer] |= shared[group_of(layer)]
    return full


class SharedTrunks:
    """Builds generated factors layer by layer, giving each sharing group one trunk."""

    def __init__(self, config: DoranConfig) -> None:
        self._config = config
        self._trunks: dict[tuple[str, int], FactorTrunk] = {}
        self._embeddings: dict[str, BlockEmbedding] = {}

    def build(self, spec: LayerSpec) -> GeneratedFactors:
        """The factors of one layer."""
        config = self._config
        group = _group(config, spec.name, spec.block, spec.rank)
        if group not in self._trunks:
            self._trunks[group] = FactorTrunk(spec.rank, config)
        embedding = None
        if config.sharing == "model":
            if spec.block not in self._embeddings:
                self._embeddings[spec.block] = BlockEmbedding(config)
            embedding = self._embeddings[spec.block]
        return GeneratedFactors(spec, config, self._trunks[group], block_embedding=embedding)
