"""Warns about expert weights without an adapter: they are stacked parameters, which target_modules does not reach."""

from __future__ import annotations

import re
import warnings

from torch import nn

from doran_core.method.config import ALL_LINEAR
from doran_core.support.names import plain_name
from doran_core.targets import expert_weights, matches
from doran_hf.expert_layers import DoranExperts

__all__ = ["expert_share", "warn_of_experts"]

_EXPERTS = re.compile(r"(?<![a-z])experts?(?![a-z])")


def expert_share(model: nn.Module) -> float:
    """The fraction of a model's parameters that are stacked expert weights without an adapter, from 0 to 1."""
    total = left_out = 0
    adapted = {
        f"{module.name}.base_layer.{name}"
        for module in model.modules()
        if isinstance(module, DoranExperts)
        for name in module.stacks()
    }
    for name, parameter in model.named_parameters():
        if ".doran_adapter." in name:
            continue
        total += parameter.numel()
        if parameter.dim() == 3 and _EXPERTS.search(name) and plain_name(name) not in adapted:
            left_out += parameter.numel()
    return left_out / total if total else 0.0


def warn_of_experts(model: nn.Module, targets: str | list[str] | set[str] | None) -> None:
    """Warn if targets name all layers, or experts by name, and expert weights stay unadapted."""
    wanted = targets == ALL_LINEAR or any(_EXPERTS.search(target) for target in _texts(targets))
    wanted = wanted or (targets is not None and any(matches(name, targets) for name in expert_weights(model)))
    share = expert_share(model) if wanted else 0.0
    if share > 0.0:
        warnings.warn(
            f"{type(model).__name__}: {share:.0%} of its parameters are expert weights stacked in one tensor, which "
            "target_modules does not reach; name them in target_parameters to adapt them",
            stacklevel=3,
        )


def _texts(targets: str | list[str] | set[str] | None) -> list[str]:
    return [] if targets is None else [targets] if isinstance(targets, str) else sorted(targets)
