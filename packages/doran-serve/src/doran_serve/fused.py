"""The fused path on a GPU: one operator that adds an adapter to a layer's output and scales it. Does not import vLLM.

The operator is opaque to torch.compile and safe under CUDA graphs: its launches depend on shapes only, and the slots
of a batch's tokens are read on the device.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from doran_serve.tile_config import FEW_TOKENS, expand_config

__all__ = ["add_adapters", "column_blocks", "prepare", "usable"]

_NAME = "add_adapters"
_library: Any = torch.library.Library("doran", "FRAGMENT")  # type: ignore[no-untyped-call]


def usable(device: torch.device) -> bool:
    """Whether the fused path runs on `device`: a GPU, with Triton installed."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def column_blocks(sizes: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The column ranges of `add_adapters`' programs, for a layer of projections with `sizes` columns in `dtype`.

    The layer keeps them as a buffer, because vLLM's sleep mode discards and restores buffers.
    """
    from doran_serve import kernels

    return kernels.column_blocks(tuple(sizes), expand_config(1, 1, dtype).columns, device)


def prepare(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, blocks: Tensor) -> None:
    """Compile and allocate what the operator needs for a layer, so that no request and no CUDA graph waits for it.

    vLLM's trial runs at its start have no adapters except for the few tokens of a graph. The arguments are those of
    `_add_adapters`.
    """
    slots, d_out, _ = b.shape
    ids = torch.full((slots + 1,), -1, dtype=torch.int32, device=b.device)  # no token has a slot
    none = torch.zeros(slots + 2, dtype=torch.int32, device=b.device)
    for tokens in (1, FEW_TOKENS + 1):
        x, y = (torch.zeros(tokens, width, dtype=b.dtype, device=b.device) for width in (a.shape[2], d_out))
        order = torch.zeros(tokens, dtype=torch.int32, device=b.device)
        _add_adapters(
            y, x, a, b, scale, bias, blocks, order, ids, none[:-1], none, torch.zeros(1, dtype=torch.bool, device="cpu")
        )


def _add_adapters(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    order: Tensor,
    ids: Tensor,
    counts: Tensor,
    starts: Tensor,
    idle: Tensor,
) -> None:
    """`y = c * (y + B A x) + (1 - c) * bias` in place, for every token that has a slot.

    Args:
        y: `[n, d_out]` the base layer's output.
        x: `[n, d_in]`.
        a: `[slots, projections * r, d_in]` of the projections that the layer packs.
        b: `[slots, d_out, r]`.
        scale: c, `[slots + 1, d_out]` float32.
        bias: `[d_out]` the bias that is in y, or None.
        blocks: from `column_blocks`, for the dtype of y.
        order: with `ids`, `counts` and `starts`: which token has which slot, see `kernels.shrink`.
        ids: see `order`.
        counts: see `order`.
        starts: see `order`.
        idle: a CPU boolean: no token has a slot.
    """
    if idle.item():  # no token of the batch has an adapter
        return
    from doran_serve import kernels

    x = x if x.stride(1) == 1 else x.contiguous()
    h = kernels.shrink(x, a, order, ids, counts, starts)
    config = expand_config(x.shape[0], b.shape[2], y.dtype)
    kernels.expand(h, b, scale, bias, y, order, ids, counts, starts, blocks, config)


_library.define(_NAME + torch.library.infer_schema(_add_adapters, mutates_args=["y"]))
_library.impl(_NAME, _add_adapters, "CUDA")
_library._register_fake(_NAME, lambda *args: None)


add_adapters: Any = torch.ops.doran.add_adapters
"""`_add_adapters` as an operator of torch."""
