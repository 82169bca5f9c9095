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

    The first layer of a group that asks becomes its owner. Layers of one block with different ranks are
    groups of their own, since embeddings have one row per rank.
    """

    def __init__(self, config: DoranConfig) -> None:
        self._config = config
        self._trunks: dict[tuple[str, int], FactorTrunk] = {}
        self._embeddings: dict[str, BlockEmbedding] = {}

    def build(self, spec: LayerSpec) -> GeneratedFactors:
        """The factors of one layer."""
        scope = {"block": spec.block, "model": "", "none": spec.name}[self._config.sharing]
        group = (scope, spec.rank)
        owns_trunk = group not in self._trunks
        if owns_trunk:
            self._trunks[group] = FactorTrunk(spec.rank, self._config)
        embedding, owns_embedding = None, False
        if self._config.sharing == "model":
            owns_embedding = spec.block not in self._embeddings
            if owns_embedding:
                self._embeddings[spec.block] = BlockEmbedding(self._config)
            embedding = self._embeddings[spec.block]
        return GeneratedFactors(
            spec,
            self._config,
            self._trunks[group],
            owns_trunk=owns_trunk,
            block_embedding=embedding,
            owns_block_embedding=owns_embedding,
        )
