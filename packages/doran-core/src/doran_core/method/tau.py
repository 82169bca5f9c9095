"""tau, the positive term in the denominator ``||V|| + tau``: its kinds, granularities and initial values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doran_core.errors import ConfigError
from doran_core.functional import per_row
from doran_core.method.config import DoranConfig
from doran_core.support.sharding import read

__all__ = ["Tau", "tau_size"]

_HALF_NORMAL_MEAN = math.sqrt(2.0 / math.pi)
"""Mean of |N(0, 1)|."""

_SMALLEST = 1e-8
"""Least initial value: softplus has no finite inverse at 0. For tau = 0 use the kind "zero"."""


def tau_size(config: DoranConfig, d_out: int, where: str, experts: int | None = None) -> int:
    """How many tau values a layer has: 1, one per head, one per expert, or one per output row.

    Args:
        config: the method's options.
        d_out: output rows of the layer, or of one expert.
        where: the layer's name, for error messages.
        experts: number of matrices in a stack; None for an ordinary layer.

    Raises:
        ConfigError: if ``head_dim`` does not divide ``d_out``, or the layer is a stack of experts, which has no heads.
    """
    if config.tau_granularity == "layer":
        return 1
    if config.tau_granularity == "expert":
        return experts or 1
    if config.tau_granularity == "row":
        return d_out * (experts or 1)
    if experts is not None:
        raise ConfigError(
            f"{where}: tau_granularity='head' has no meaning for stacked expert weights; use 'layer', 'expert' or 'row'"
        )
    if config.head_dim is None or d_out % config.head_dim:
        raise ConfigError(
            f"{where}: tau_granularity='head' needs a head_dim that divides the {d_out} output rows, "
            f"got head_dim={config.head_dim!r}"
        )
    return d_out // config.head_dim


def _inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


class Tau(nn.Module):
    """tau of one layer, positive by construction: ``softplus(raw)``.

    Kinds (``DoranConfig.tau_kind``): ``learned``, ``fixed`` (a buffer), ``zero`` (DoRA; no tensor at all), and
    ``gaussian``: in training the denominator gets ``|N(0, sigma^2)|``, drawn anew at each call, and at inference
    its mean, ``sigma * sqrt(2 / pi)``. For this kind, ``softplus(raw)`` is sigma, learned or fixed.

    Args:
        config: the method's options.
        d_out: output rows of the layer, or of one expert.
        where: the layer's name, for error messages.
        experts: number of matrices in a stack; None for an ordinary layer.
    """

    raw: Tensor | None

    def __init__(self, config: DoranConfig, d_out: int, where: str = "layer", *, experts: int | None = None) -> None:
        super().__init__()
        self.kind = config.tau_kind
        self.d_out = d_out
        self.experts = experts
        self.relative = config.tau_init_relative
        self.init_value = config.tau_init
        if self.kind == "zero":
            self.raw = None
            return
        raw = torch.zeros(tau_size(config, d_out, where, experts), dtype=torch.float32)
        if self.kind == "learned" or (self.kind == "gaussian" and config.tau_learn_sigma):
            self.raw = nn.Parameter(raw)
        else:
            self.register_buffer("raw", raw)

    @torch.no_grad()
    def initialise(self, norm: Tensor) -> None:
        """Set the initial value: ``tau_init``, times the mean of ``norm`` over each group if relative."""
        if self.raw is None:
            return
        groups = norm.detach().reshape(self.raw.numel(), -1).mean(1)
        start = groups * self.init_value if self.relative else torch.full_like(groups, self.init_value)
        self.raw.copy_(_inverse_softplus(start.double().clamp_min(_SMALLEST)))

    def value(self) -> Tensor:
        """The value that inference adds to the norm: ``[1]``, per head or row ``[d_out]``; a scalar 0 for kind zero.

        For a stack: ``[1]``, per expert ``[experts, 1]`` or per row ``[experts, d_out]``.
        """
        return torch.zeros(()) if self.raw is None else self.value_of(read(self.raw))

    def value_of(self, raw: Tensor) -> Tensor:
        """:meth:`value` of raw values ``[..., k]``: of one layer, or of many like it."""
        positive = F.softplus(raw)
        return self._per_row(positive * _HALF_NORMAL_MEAN if self.kind == "gaussian" else positive)

    def _per_row(self, groups: Tensor) -> Tensor:
        if self.experts is None:
            return per_row(groups, self.d_out)
        return groups if groups.shape[-1] == 1 else groups.reshape(self.experts, -1)

    def forward(self) -> Tensor | float:
        """The value that this pass adds to the norm: in training, a new draw for the kind gaussian."""
        if self.raw is None:
            return 0.0
        if self.kind == "gaussian" and self.training:
            sigma = F.softplus(read(self.raw))
            return self._per_row((sigma * torch.randn_like(sigma)).abs())
        return self.value()

    def extra_repr(self) -> str:
        return f"kind={self.kind}, size={0 if self.raw is None else self.raw.numel()}"
