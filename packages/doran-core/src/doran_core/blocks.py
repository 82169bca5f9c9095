"""Which adapted layers share a trunk: names to blocks, blocks to sharing groups."""

from __future__ import annotations

import re

from doran_core.config import DoranConfig
from doran_core.factors import BlockEmbedding, FactorTrunk, GeneratedFactors, LayerSpec

__all__ = ["SharedTrunks", "block_of"]

_LAST_NUMBER = re.compile(r"(.*\.|)\d+(?=\.)")


def block_of(name: str, pattern: str | None = None) -> str:
    """The block of a module, by its name.

    ``model.layers.3.self_attn.q_proj`` -> ``model.layers.3``; a name without a number inside -> ``""``.

    Args:
        name: the module's full name.
        pattern: a regex that finds the block: its first group if it has one, else the whole match.
    """
    match = re.search(pattern, name) if pattern else _LAST_NUMBER.match(name)
    if match is None:
        return ""
    return match[1] if pattern and match.re.groups else match[0]


class SharedTrunks:
    """Builds generated factors layer by layer, giving each sharing group one trunk.

    The first layer of a group that asks owns the trunk. Layers of one block with different ranks are groups of
    their own, since embeddings have one row per rank.
    """

    def __init__(self, config: DoranConfig) -> None:
        self._config = config
        self._trunks: dict[tuple[str, int], FactorTrunk] = {}
        self._embeddings: dict[str, BlockEmbedding] = {}

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
        group = ({"block": spec.block, "model": "", "none": spec.name}[config.sharing], spec.rank)
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
        )
