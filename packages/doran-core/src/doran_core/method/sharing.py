"""Which adapted layers share a trunk: names to blocks, blocks to sharing groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from doran_core.kernels.fleet import Fleet
from doran_core.method.config import DoranConfig
from doran_core.method.factors import BlockEmbedding, FactorTrunk, GeneratedFactors, LayerSpec
from doran_core.support.patterns import name_pattern

__all__ = ["BLOCK_EMBEDDING", "TRUNK", "SharedTrunks", "block_of", "sharing_group", "with_owners_of"]

TRUNK = "factors.trunk."
"""Start of the names of what a sharing group's first layer owns for all of it, among a layer's tensors."""
BLOCK_EMBEDDING = "factors.block_embedding."
"""Likewise for the vector of a block, with ``sharing="model"``."""

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
    """What the layers that share a trunk with the layer of this name have in common, by the names alone."""
    return _group(config, name, block_of(name, config.block_pattern), config.rank_for(name))


def _group(config: DoranConfig, name: str, block: str, rank: int) -> tuple[str, int]:
    """Layers of one block with different ranks are groups of their own: embeddings have one row per rank."""
    return {"block": block, "model": "", "none": name}[config.sharing], rank


def with_owners_of(
    owners: Mapping[str, Collection[str]], tensors: Mapping[str, Mapping[str, _T]], config: DoranConfig
) -> dict[str, dict[str, _T]]:
    """Saved tensors with what is shared under the layers that own it in a model.

    The first layer of a group owns its trunk, and models may register the same layers in another order.

    Args:
        owners: names of each layer's tensors in the model.
        tensors: saved tensors by name, of the same layers.
        config: the options that decide the groups.
    """
    moved = {layer: dict(parts) for layer, parts in tensors.items()}
    groups: dict[str, Callable[[str], object]] = {
        TRUNK: lambda layer: sharing_group(layer, config),
        BLOCK_EMBEDDING: lambda layer: block_of(layer, config.block_pattern),
    }
    for start, group_of in groups.items():
        here = {group_of(layer): layer for layer, names in owners.items() if _any_starts(names, start)}
        for layer, parts in tensors.items():
            owner = here.get(group_of(layer), layer)
            for name in parts:
                if name.startswith(start) and name not in moved[owner]:
                    moved[owner][name] = moved[layer].pop(name)
    return moved


def _any_starts(names: Collection[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)


class SharedTrunks:
    """Builds generated factors layer by layer, giving each sharing group one trunk.

    The first layer of a group that asks owns the trunk.
    """

    def __init__(self, config: DoranConfig) -> None:
        self._config = config
        self._trunks: dict[tuple[str, int], FactorTrunk] = {}
        self._embeddings: dict[str, BlockEmbedding] = {}
        self._fleet = Fleet()

    def build(
        self, spec: LayerSpec, *, owns_trunk: bool | None = None, owns_block_embedding: bool | None = None
    ) -> GeneratedFactors:
        """The factors of one layer.

        Args:
            spec: the layer.
            owns_trunk: register the group's trunk here; None for "if this is the group's first layer".
            owns_block_embedding: likewise for the block's embedding.
        """
        config = self._config
        group = _group(config, spec.name, spec.block, spec.rank)
        first_of_group = group not in self._trunks
        if first_of_group:
            self._trunks[group] = FactorTrunk(spec.rank, config)
        embedding, first_of_block = None, False
        if config.sharing == "model":
            first_of_block = spec.block not in self._embeddings
            if first_of_block:
                self._embeddings[spec.block] = BlockEmbedding(config)
            embedding = self._embeddings[spec.block]
        return GeneratedFactors(
            spec,
            config,
            self._trunks[group],
            owns_trunk=first_of_group if owns_trunk is None else owns_trunk,
            block_embedding=embedding,
            owns_block_embedding=first_of_block if owns_block_embedding is None else owns_block_embedding,
            fleet=self._fleet,
        )
