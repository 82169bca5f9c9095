"""Singular values, effective rank and similarity of low-rank updates ``B A``, without forming the product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["delta_similarity", "effective_rank", "singular_values"]


@torch.no_grad()
def singular_values(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """Singular values of ``g B A``, ``[min(r, d_out, d_in)]``, float64, from the largest to the smallest.

    Args:
        A: ``[r, d_in]``; the result keeps a further first dimension, of experts.
        B: ``[d_out, r]``.
        scaling: g.
    """
    inner = torch.linalg.qr(B.double()).R @ torch.linalg.qr(A.double().mT).R.mT
    values: Tensor = torch.linalg.svdvals(inner)
    return values * abs(scaling)


@torch.no_grad()
def effective_rank(values: Tensor) -> float:
    """``exp`` of the entropy of the normalised singular values (Roy and Vetterli, 2007): from 1 to their number.

    The result is 0 if all values are 0.

    Args:
        values: singular values ``[k]``.
    """
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = (values / total).clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.exp(-(shares * shares.log()).sum()))


@torch.no_grad()
def delta_similarity(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Cosine similarities between the updates ``B A`` of layers of equal size, ``[layers, layers]``, float64.

    Args:
        pairs: ``(A [r, d_in], B [d_out, r])`` of each layer; r may differ. A layer with B = 0 has similarity 0.
    """
    # <B_i A_i, B_j A_j> = sum of (B_i' B_j) * (A_i A_j'), for all j at once.
    ranks = [A.shape[0] for A, _ in pairs]
    all_A = torch.cat([A.double() for A, _ in pairs])
    all_B = torch.cat([B.double() for _, B in pairs], dim=1)
    rows = []
    for A, B in zip(torch.split(all_A, ranks), torch.split(all_B, ranks, dim=1), strict=True):
        products = ((all_B.T @ B) * (all_A @ A.T)).sum(1)
        rows.append(torch.stack([part.sum() for part in torch.split(products, ranks)]))
    inner = torch.stack(rows)
    lengths = inner.diagonal().clamp_min(0).sqrt()
    scale = torch.outer(lengths, lengths)
    return torch.where(scale > 0, inner / torch.where(scale > 0, scale, 1.0), 0.0)
