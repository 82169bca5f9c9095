"""The paper's factor networks by hand: from their parameters to A and B, and back.

A = F_A W2_A^T    B = W2_B F_B^T    F = act(E W1^T / sqrt(e)) / h

The activations here are positively homogeneous, so the two divisions are one factor behind them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MOST_RANK", "SLOPES", "Networks", "are_uniform", "fit_kernels", "gradients", "values"]

SLOPES = {"leaky_relu": 0.01, "relu": 0.0, "identity": 1.0}
"""Slope left of 0 of the piecewise linear activations."""


MOST_RANK = 64
MOST_WIDTH = 128
"""Sizes up to which a rank or a hidden layer, and an embedding, are one block of a kernel."""


class Networks(NamedTuple):
    """The parameters of a layer's two networks.

    Attributes:
        embedding_A: ``[r, e]``.
        w1_A: ``[h, e]``.
        w2_A: ``[d_in, h]``.
        embedding_B: ``[r, e]``.
        w1_B: ``[h, e]``.
        w2_B: ``[d_out, h]``.
    """

    embedding_A: Tensor
    w1_A: Tensor
    w2_A: Tensor
    embedding_B: Tensor
    w1_B: Tensor
    w2_B: Tensor


def fit_kernels(rank: int, hidden: int, width: int) -> bool:
    """Whether networks of rank r, hidden layers h and embeddings e fit into one block of the kernels."""
    return max(rank, hidden) <= MOST_RANK and width <= MOST_WIDTH


def are_uniform(networks: Networks) -> bool:
    """Whether all parameters have one dtype, float32 or wider, one device, and lie in memory row by row."""
    dtype, device = networks.w2_A.dtype, networks.w2_A.device
    return dtype.itemsize >= 4 and all(p.dtype == dtype and p.device == device and p.is_contiguous() for p in networks)


def _scale(w1: Tensor) -> float:
    """``1 / (h sqrt(e))``."""
    hidden, width = w1.shape
    return 1.0 / (hidden * math.sqrt(width))


def _features(embedding: Tensor, w1: Tensor, slope: float) -> Tensor:
    """``F``, ``[r, h]``."""
    return F.leaky_relu(embedding @ w1.T, slope, inplace=True).mul_(_scale(w1))


def values(networks: Networks, slope: float) -> tuple[Tensor, Tensor]:
    """``(A [r, d_in], B [d_out, r])``, without a gradient."""
    features_A = _features(networks.embedding_A, networks.w1_A, slope)
    features_B = _features(networks.embedding_B, networks.w1_B, slope)
    return features_A @ networks.w2_A.T, networks.w2_B @ features_B.T


def gradients(networks: Networks, slope: float, grad_A: Tensor, grad_B: Tensor) -> Networks:
    """The gradients of the networks' parameters from those of A ``[r, d_in]`` and B ``[d_out, r]``."""
    return Networks(
        *_one_gradient(networks.embedding_A, networks.w1_A, networks.w2_A, slope, grad_A),
        *_one_gradient(networks.embedding_B, networks.w1_B, networks.w2_B, slope, grad_B.T),
    )


def _one_gradient(
    embedding: Tensor, w1: Tensor, w2: Tensor, slope: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``E``, ``W1`` and ``W2`` from that of ``F W2^T``."""
    features = _features(embedding, w1, slope)
    inner = torch.ops.aten.leaky_relu_backward(grad @ w2, features, slope, False).mul_(_scale(w1))
    return inner @ w1, inner.T @ embedding, grad.T @ features
