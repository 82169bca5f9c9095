"""Says how much of a mixture-of-experts model no adapter reaches: its experts are parameters, not linear layers."""

from __future__ import annotations

import re
import warnings

from torch import nn

from doran_core.method.config import ALL_LINEAR

__all__ = ["expert_share", "warn_of_experts"]

_EXPERTS = re.compile(r"(^|\.|_)experts?(\.|_|$)")


def expert_share(model: nn.Module) -> float:
    """The part of a model's parameters in stacked expert weights ``[experts, rows, columns]``, from 0 to 1."""
    total = left_out = 0
    for name, parameter in model.named_parameters():
        if ".doran_adapter." in name:
            continue
        total += parameter.numel()
        if parameter.dim() == 3 and _EXPERTS.search(name):
            left_out += parameter.numel()
    return left_out / total if total else 0.0


def warn_of_experts(model: nn.Module, targets: str | list[str] | set[str] | None) -> None:
    """Warn where targets ask for all of a model, or for experts by name, and the experts cannot be adapted."""
    wanted = targets == ALL_LINEAR or any(_EXPERTS.search(target) for target in _texts(targets))
    share = expert_share(model) if wanted else 0.0
    if share > 0.0:
        warnings.warn(
            f"{type(model).__name__}: {share:.0%} of its parameters are expert weights stacked in one tensor, which "
            "DoRAN does not adapt; target_modules reaches the other layers alone (attention, routers, shared experts)",
            stacklevel=3,
        )


def _texts(targets: str | list[str] | set[str] | None) -> list[str]:
    return [] if targets is None else [targets] if isinstance(targets, str) else sorted(targets)
