"""From an adapter, its base layer and an input to the implementation that can run them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from doran_core.kernels import torch_internals as internals
from doran_core.kernels.adapted_linear import apply
from doran_core.kernels.backend import Implementation, choose
from doran_core.kernels.layer_groups import is_ordinary, is_supported

if TYPE_CHECKING:
    from doran_core.layers.adapter import DoranAdapter
    from doran_core.layers.base import BaseView  # which imports this package

__all__ = ["run"]


def run(adapter: DoranAdapter, view: BaseView, x: Tensor, base_output: Tensor | None) -> Tensor | None:
    """The adapted output, shaped as the base layer's; None if this call is the reference's.

    Args:
        adapter: of the layer.
        view: of its base layer.
        x: the base layer's input, ``[..., d_in]``.
        base_output: what it made of x, or None to leave that to this function.

    Raises:
        BackendError: an implementation was asked for by name and cannot run on these tensors.
    """
    implementation = _implementation(adapter, view, x)
    if implementation == "reference":
        return None
    own = view.layer._parameters
    weight, bias = own.get("weight"), own.get("bias")
    plain = base_output is None and view.kind == "linear" and _is_plain_product(view, x, weight)
    if not plain and base_output is None:
        base_output = view.layer(x)  # a call, so that the layer's own hooks run: gathering of shards, quantization
    low = None if base_output is None else x.to(base_output.dtype)
    dropout = adapter.config.dropout
    if dropout > 0.0 and adapter.training:
        low = F.dropout(x if low is None else low, dropout)
    side = adapter.runtime.side(adapter, view, implementation)
    if base_output is not None:
        return apply(side, None, low, None, view.bias, base_output)
    recomputes = side.recomputes[1 if side.recomputes[1] and internals.has_saved_tensor_hooks() else 0]
    return apply(side, x, low, weight, bias, None, recomputes=recomputes)


def _implementation(adapter: DoranAdapter, view: BaseView, x: Tensor) -> Implementation:
    """The reference computes what the others do not.

    Embeddings and convolutions, a trained bias, a norm that is to be taken directly, tensor subclasses (DTensor),
    sharded or missing parameters, DataParallel's replicas, function transforms, tracing, and modes that see or replace
    single operations, such as selective checkpointing's.
    """
    if not is_supported(adapter, view) or not x.is_floating_point() or x.numel() == 0:
        return "reference"
    if internals.needs_single_operations():
        return "reference"
    magnitude = adapter.magnitude
    if not is_ordinary(magnitude) or magnitude.dtype.itemsize < 4 or internals.is_replica(adapter):
        return "reference"
    weight, bias = view.weight(), view.bias
    if weight is not None and (not is_ordinary(weight) or weight.requires_grad):
        return "reference"
    if bias is not None and bias.requires_grad:
        return "reference"
    return choose(x.device, magnitude.dtype if magnitude.dtype == torch.float64 else x.dtype)


def _is_plain_product(view: BaseView, x: Tensor, weight: Tensor | None) -> bool:
    """Whether the base layer's call is ``F.linear`` in one precision and nothing else sees it."""
    if weight is None or x.dtype != weight.dtype or not view.is_plain:
        return False
    kind = x.device.type
    return not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == x.dtype
