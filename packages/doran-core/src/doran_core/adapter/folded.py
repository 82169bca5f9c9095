"""Fold one layer: evaluate its networks once and keep A, B, the output scale c and the equal DoRA magnitude."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from doran_core.adapter.evaluate import LayerFactors, layer_factors
from doran_core.adapter.schema import FoldedModule, Kind
from doran_core.functional import output_scale, row_norm
from doran_core.layers.adapter import DoranAdapter

__all__ = ["fold_layer", "fold_module"]

_PIECE = 2**18
"""Elements of a weight that are in float64 at a time."""
_PIECE_ON_DEVICE = 2**23
"""The same on an accelerator, where small pieces would wait for their launches."""

_SMALLEST_NORM = math.sqrt(torch.finfo(torch.float32).tiny)
"""Below this norm, float32 squares underflow, and PEFT's norm may be 0."""


def fold_module(
    name: str,
    adapter: DoranAdapter,
    weight: Tensor,
    *,
    kind: Kind = "linear",
    kernel: tuple[int, ...] | None = None,
) -> FoldedModule:
    """The folded form of one live adapted layer.

    Args:
        name: the module's name in the base model.
        adapter: the layer's trainable part; masks and noise do not apply.
        weight: W0 seen as ``[d_out, d_in]``.
        kind: how the base keeps the weight.
        kernel: ``(in_channels, kh, kw)`` of a conv2d.
    """
    return fold_layer(layer_factors(name, adapter), _pieces(weight), kind, kernel)


@torch.no_grad()
def fold_layer(
    layer: LayerFactors,
    weight_rows: Iterable[tuple[slice, Tensor]],
    kind: Kind,
    kernel: tuple[int, ...] | None,
) -> FoldedModule:
    """The folded form of one layer, with the norm and the scale taken in float64 and rounded to float32 once.

    Args:
        layer: its evaluated factors.
        weight_rows: slices of rows of W0 ``[d_out, d_in]`` in order, with their values.
        kind: how the base keeps the weight.
        kernel: ``(in_channels, kh, kw)`` of a conv2d.
    """
    # The norm belongs to the factors as they are stored: scaling joins B, and both are rounded, before it is taken.
    A, B = layer.A.float().contiguous(), (layer.B.double() * layer.scaling).float().contiguous()
    norm = torch.cat(list(_norms(weight_rows, A.double(), B.double()))).cpu()
    exact = layer.double()
    if exact.scale is not None:
        scale = exact.scale
    else:
        assert exact.magnitude is not None
        scale = output_scale(exact.magnitude, norm, exact.tau)
    zero_rows = tuple(torch.nonzero(norm < _SMALLEST_NORM).flatten().tolist())
    return FoldedModule(layer.name, A, B, scale.float(), (scale * norm).float(), kind, kernel, zero_rows)


def _norms(weight_rows: Iterable[tuple[slice, Tensor]], A: Tensor, B: Tensor) -> Iterator[Tensor]:
    """``||W0 + B A||`` of each slice of rows, on the weight's device, all in the memory of the first and largest."""
    memory = None
    for rows, weight in weight_rows:
        if memory is None:
            memory = torch.empty(weight.shape, dtype=torch.float64, device=weight.device)
            A, B = A.to(weight.device), B.to(weight.device)
        yield row_norm(weight, A, B[rows], 1.0, out=memory[: weight.shape[0]])


def _pieces(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A weight in memory as slices of rows, so that its float64 copy stays small."""
    if weight.device.type == "mps":  # it has no float64
        weight = weight.cpu()
    elements = _PIECE if weight.device.type == "cpu" else _PIECE_ON_DEVICE
    step = max(1, elements // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        yield rows, weight[rows].detach()
