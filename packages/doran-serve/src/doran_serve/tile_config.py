"""Tile sizes of the kernels for a batch: the block of tokens and columns of each program. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "EXPAND_COLUMNS",
    "FEW_TOKENS",
    "ExpandConfig",
    "ShrinkConfig",
    "expand_config",
    "shrink_config",
    "token_blocks",
]

EXPAND_COLUMNS = (64, 128)
"""Values of `ExpandConfig.columns` that `expand_config` chooses among."""

FEW_TOKENS = 256
"""Most tokens for the tiles of decoding; more tokens use the tiles of prompts."""

_MULTIPROCESSORS = 132
"""Approximate number of parallel programs; only the split of d_in depends on it."""


@dataclass(frozen=True)
class ShrinkConfig:
    """Tile sizes: tokens, columns of h, columns of x; d_in is cut into `split` parts."""

    tokens: int
    columns: int
    depth: int
    split: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class ExpandConfig:
    """Tile sizes: tokens, columns of y, ranks."""

    tokens: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 2


def shrink_config(tokens: int, slots: int, width: int, d_in: int, dtype: torch.dtype) -> ShrinkConfig:
    """Tile sizes for `tokens` tokens of up to `slots` adapters, h of `width` columns.

    Args:
        tokens: n.
        slots: of the engine.
        width: projections packed in the layer, times the largest rank.
        d_in: columns of x.
        dtype: of x; float32 takes more room.
    """
    block = 16 if tokens <= FEW_TOKENS else 64
    wide = min(128, max(16, _power_of_two(width)))
    depth = 128 if dtype != torch.float32 else 32
    programs = token_blocks(tokens, slots, block) * -(-width // wide)
    split = max(1, min(2 * _MULTIPROCESSORS // programs, d_in // (2 * depth), 32 if tokens < 16 else 8))
    return ShrinkConfig(block, wide, depth, split)


def expand_config(tokens: int, rank: int, dtype: torch.dtype) -> ExpandConfig:
    """Tile sizes for `tokens` tokens and slots of `rank`."""
    columns = EXPAND_COLUMNS[dtype != torch.float32]
    depth = min(64, max(16, _power_of_two(rank)))
    if tokens <= FEW_TOKENS:
        return ExpandConfig(16, columns, depth)
    return ExpandConfig(64, columns, depth, warps=8)  # four would spill registers


def token_blocks(tokens: int, slots: int, block: int) -> int:
    """Upper bound of the token blocks when each slot's tokens start a new one."""
    return -(-tokens // block) + min(slots, tokens) - 1


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
