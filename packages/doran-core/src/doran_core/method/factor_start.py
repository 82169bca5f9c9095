"""First values of the factor networks: embeddings and hidden weights whose features H(0) are close to the identity.

With ``H = act(E W1^T / sqrt(e)) / h`` close to the identity, A and B start as LoRA's static factors, and a step of Adam
moves them about as far. Entries off the diagonal stay clear of 0, where the slope of a leaky ReLU changes: at 0,
rounding would choose the slope.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["first_output_weight", "first_values", "identity_start", "normal_start"]

Activation = Callable[[Tensor], Tensor]

_OFF = 0.02
"""Relative bound on the effect of the entries off the support on a singular value of H."""
_BISECTIONS = 60


def first_values(kind: str, rank: int, widths: Sequence[int], activation: Activation) -> list[Tensor]:
    """The embedding ``[r, e]`` and the hidden weights ``[wide, narrow]`` of one factor's network, in float32.

    Args:
        kind: "identity" or "normal", as ``DoranConfig.generator_init``.
        rank: r.
        widths: e, then the width of each hidden layer.
        activation: between the layers.

    Returns:
        One tensor for each width, on the default device; drawn on the CPU, so that a seed gives the same everywhere.
    """
    device = torch.empty(0).device
    with torch.device("cpu"):
        start = normal_start(rank, widths) if kind == "normal" else identity_start(rank, widths, activation)
    return [tensor.to(device) for tensor in start]


def normal_start(rank: int, widths: Sequence[int]) -> list[Tensor]:
    """Embedding and weights from N(0, 1), the studies' "old start": H is then nearly of rank one."""
    shapes = [(rank, widths[0]), *((wide, narrow) for narrow, wide in pairwise(widths))]
    return [torch.randn(shape, dtype=torch.float32) for shape in shapes]


def identity_start(rank: int, widths: Sequence[int], activation: Activation) -> list[Tensor]:
    """Embedding and weights that make the features as close to the identity as activation and widths allow.

    If the hidden width h is a multiple of r, each row of H has h / r units of its own, of value r / h. Otherwise some
    rows have one unit more than others, and the values make all rows equally long. With h or e below r, H cannot have
    rank r. A bounded activation (tanh) gives values below r / h.

    Computed in float64 on the CPU, so that a seed gives the same values on every device.

    Args:
        rank: r.
        widths: e, then the width of each hidden layer.
        activation: increasing right of 0, with value 0 at 0.

    Returns:
        The embedding ``[r, e]`` and the hidden weights ``[wide, narrow]``, in float32.
    """
    if len(widths) == 1:  # no hidden layer: the features are the embedding, divided by e
        return [_support(rank, widths[0]).float()]
    if widths[0] < rank:
        warnings.warn(
            f"embedding_dim={widths[0]} is below the rank {rank}: the factor networks then start far from the "
            "identity, and train worse; leave embedding_dim at None, or raise it",
            stacklevel=2,
        )
    features = _orthogonal(rank, widths[0])
    start = [features]
    for narrow, wide in pairwise(widths):
        target = _support(rank, wide)
        if len(start) < len(widths) - 1:
            target /= math.sqrt(rank)  # rows of length sqrt(wide), as the embedding's
        before = _off_zero(_inverse(activation, target))
        start.append(math.sqrt(narrow) * before.T @ _dual(features))
        features = activation(features @ start[-1].T / math.sqrt(narrow))
    return [tensor.float() for tensor in start]


def first_output_weight(features: Tensor, d_in: int) -> Tensor:
    """W2_A ``[d_in, h]`` in float32 such that ``features @ W2_A.T`` has the spread of LoRA's A, whatever the network.

    Args:
        features: H of A, ``[r, h]``, in float64 on the CPU, or on the meta device.
        d_in: columns of A.
    """
    weight = torch.randn(d_in, features.shape[1], dtype=torch.float32, device=features.device)
    if features.is_meta:
        return weight
    spread = (features @ weight.to(features).T).square().mean().sqrt().clamp_min(1e-12)
    return weight * (1.0 / math.sqrt(3.0 * d_in) / float(spread))


def _support(rank: int, width: int) -> Tensor:
    """``width`` times the ``[rank, width]`` matrix closest to an identity: row i has the units i, i + r, i + 2r, ...

    All nonzero singular values are equal. A square result is r times the identity.
    """
    short = min(rank, width)
    rows, units = torch.arange(rank)[:, None] % short, torch.arange(width)[None, :] % short
    chosen = (rows == units).double()
    sharing = chosen.sum(1 if width >= rank else 0, keepdim=True)
    return chosen * (width * rank / sharing).sqrt()


def _orthogonal(rank: int, width: int) -> Tensor:
    """``[rank, width]`` with orthogonal rows of length sqrt(width), or orthogonal columns where it is too narrow."""
    tall = torch.randn(max(rank, width), min(rank, width), dtype=torch.float64)
    columns: Tensor = torch.linalg.qr(tall).Q * math.sqrt(max(rank, width))
    return columns.T if width >= rank else columns


def _dual(features: Tensor) -> Tensor:
    """The transposed pseudoinverse."""
    wide = features.shape[0] <= features.shape[1]
    dual: Tensor = torch.linalg.solve(features @ features.T, features) if wide else torch.linalg.pinv(features).T
    return dual


def _inverse(activation: Activation, target: Tensor) -> Tensor:
    """Inputs at which the activation has these values (not below 0), or a multiple of them if they are out of reach."""
    largest = target.amax()
    if activation(2.0 * largest) < largest:
        target = target * (activation(torch.ones_like(largest)) / largest)
    values, places = target.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    low, high = torch.zeros_like(values), torch.full_like(values, 2.0 * float(largest))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = activation(middle) < values
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(values > 0, high, 0.0)[places]


def _off_zero(before: Tensor) -> Tensor:
    """Pre-activations with ``+-delta`` in place of their zeros, with random signs."""
    delta = _OFF * before.amax() / (before.shape[0] + 1)
    signs = torch.randint(0, 2, before.shape).double() * 2 - 1
    return torch.where(before == 0, signs * delta, before)
