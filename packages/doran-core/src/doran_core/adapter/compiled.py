"""Compile one layer: evaluate its networks once and keep A, B, the output scale c and the equal DoRA magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from doran_core.adapter.schema import CompiledModule, Kind
from doran_core.functional import output_scale, row_norm
from doran_core.layers.adapter import DoranAdapter

__all__ = ["compile_factors", "compile_module"]

_CHUNK_ELEMENTS = 2**22


@torch.no_grad()
def compile_module(
    name: str,
    adapter: DoranAdapter,
    weight: Tensor,
    *,
    kind: Kind = "linear",
    kernel: tuple[int, ...] | None = None,
) -> CompiledModule:
    """The compiled form of one adapted layer, with the norm taken in float64.

    Args:
        name: the module's name in the base model.
        adapter: the layer's trainable part; masks and noise are off whatever its mode.
        weight: W0 seen as ``[d_out, d_in]``.
        kind: how the base keeps the weight.
        kernel: ``(in_channels, kh, kw)`` of a conv2d.
    """
    with adapter.inference_mode_of_method():
        A, B = adapter.factor_pair()
    A, B, magnitude = (tensor.detach().cpu() for tensor in (A, B, adapter.magnitude))
    tau = adapter.tau.value().detach().cpu().double()
    # The norm belongs to the factors as they are stored: scaling joins B, and both are rounded, before it is taken.
    stored_A, stored_B = A.float().contiguous(), (B.double() * adapter.scaling).float().contiguous()
    norm = chunked_row_norm(weight, stored_A, stored_B)
    return compile_factors(name, stored_A, stored_B, norm, output_scale(magnitude.double(), norm, tau), kind, kernel)


def compile_factors(
    name: str,
    A: Tensor,
    B: Tensor,
    norm: Tensor,
    scale: Tensor,
    kind: Kind = "linear",
    kernel: tuple[int, ...] | None = None,
) -> CompiledModule:
    """The record of a layer whose stored factors, norm and scale are known.

    Args:
        name: the module's name in the base model.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``, scaling included.
        norm: ``||W0 + B A||``, ``[d_out]``, float64.
        scale: c, ``[d_out]``, float64.
        kind: how the base keeps the weight.
        kernel: ``(in_channels, kh, kw)`` of a conv2d.
    """
    return CompiledModule(name, A, B, scale.float(), (scale * norm).float(), kind, kernel)


def chunked_row_norm(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``||W0 + B A||`` per row in float64, ``[d_out]``, with little memory beside the weight ``[d_out, d_in]``."""
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    norms = [
        row_norm(
            weight[start : start + step].detach().cpu().double(), A.double(), B[start : start + step].double(), 1.0
        )
        for start in range(0, weight.shape[0], step)
    ]
    return torch.cat(norms)
