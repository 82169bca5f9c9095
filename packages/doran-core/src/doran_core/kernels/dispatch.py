"""From an adapter, its base layer and an input to the implementation that can run them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core.kernels.adapted_linear import apply
from doran_core.support import torch_internals as internals

if TYPE_CHECKING:
    from doran_core.layers.adapter import DoranAdapter
    from doran_core.layers.base import BaseView  # which imports this package

__all__ = ["run"]


def run(adapter: DoranAdapter, view: BaseView, x: Tensor, base_output: Tensor | None) -> Tensor | None:
    """The adapted output, shaped as the base layer's; None if this call is the reference's.

    That has what :func:`~doran_core.kernels.layer_groups.implementation_of` leaves to it, function transforms, tracing,
    and modes that see or replace single operations, such as selective checkpointing's.

    Args:
        adapter: of the layer.
        view: of its base layer.
        x: the base layer's input, ``[..., d_in]``.
        base_output: what it made of x, or None to leave that to this function.

    Raises:
        BackendError: an implementation was asked for by name and cannot run on these tensors.
    """
    if not x.is_floating_point() or x.numel() == 0 or internals.needs_single_operations():
        return None
    side = adapter.runtime.side(adapter, view, x)
    if side is None:
        return None
    own = internals.own_parameters(view.layer)
    weight, bias = own.get("weight"), own.get("bias")
    plain = base_output is None and view.kind == "linear" and _is_plain_product(view, x, weight)
    if not plain and base_output is None:
        base_output = view.layer(x)  # a call, so that the layer's own hooks run: gathering of shards, quantization
    low = None if base_output is None else x.to(base_output.dtype)
    config = adapter.config
    if config.dropout > 0.0 and adapter.training:
        low = F.dropout(x if low is None else low, config.dropout)
    if base_output is not None:
        return apply(side, None, low, None, view.bias, base_output)
    recomputes = side.recomputes[1 if side.recomputes[1] and internals.has_saved_tensor_hooks() else 0]
    return apply(side, x, low, weight, bias, None, recomputes=recomputes)


def _is_plain_product(view: BaseView, x: Tensor, weight: Tensor | None) -> bool:
    """Whether the base layer's call is ``F.linear`` in one precision and nothing else sees it."""
    if weight is None or x.dtype != weight.dtype or not view.is_plain:
        return False
    kind = x.device.type
    return not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == x.dtype
