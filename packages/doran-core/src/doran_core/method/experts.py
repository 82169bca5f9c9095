"""MLAE (arXiv 2405.18897): B A read as r rank-one experts with learned coefficients and random masks in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doran_core.method.config import DoranConfig
from doran_core.support.sharding import read

__all__ = ["RankOneExperts"]


class RankOneExperts(nn.Module):
    """``A -> diag(lambda * mask) @ A``, so that ``B @ diag(lambda * mask) @ A`` is a masked sum of experts.

    A mask keeps an entry with probability ``1 - expert_dropout``, and divides what it keeps by that probability, so its
    mean is 1. The mask "expert" has one entry per expert, "element" one per element of A. The DoRAN paper's appendix
    leaves details open; they are our choice.

    Args:
        rank: r.
        config: the method's options.
    """

    def __init__(self, rank: int, config: DoranConfig) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.ones(rank, dtype=torch.float32))
        self.mask = config.expert_mask
        self.dropout = config.expert_dropout

    def forward(self, A: Tensor) -> Tensor:
        """A ``[r, d_in]`` to the same shape; random in training if there is a mask."""
        A = read(self.coefficients)[:, None] * A
        if not self.training or self.mask == "none" or self.dropout == 0.0:
            return A
        shape = (A.shape[0], 1) if self.mask == "expert" else tuple(A.shape)
        keep = torch.rand(shape, device=A.device) >= self.dropout
        return A * (keep / (1.0 - self.dropout))

    def extra_repr(self) -> str:
        return f"mask={self.mask}, dropout={self.dropout}"
