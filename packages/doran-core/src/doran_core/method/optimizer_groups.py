"""Optimizer groups: the trainable parameters with weight decay, and those without."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from doran_core.errors import ConfigError
from doran_core.support.sharding import is_flattened, whole_shape

__all__ = ["is_decayed", "is_exempt", "parameter_groups"]

_OWN = ("magnitude", "raw", "coefficients", "vector")
"""Last parts of the names of adapter parameters without decay: for them 0 is no neutral value.

A magnitude of 0 removes the row, a raw tau of 0 is a tau of 0.69 whatever the weight's norm, an expert's coefficient
starts at 1, and a block's vector is a position, not a weight.
"""


def is_exempt(name: str) -> bool:
    """Whether a parameter belongs to an adapter and must not decay."""
    return name.rpartition(".")[2] in _OWN


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay makes sense for a trainable parameter: a matrix whose name is not in `_OWN`.

    Raises:
        ConfigError: FSDP1 has flattened the parameter.
    """
    if is_flattened(parameter):
        raise ConfigError(f"{name}: FSDP1 has flattened it; make the optimizer's groups before the model is wrapped")
    return not is_exempt(name) and len(whole_shape(parameter)) > 1


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: with decay and without; an empty group is left out.

    Args:
        parameters: names and parameters; frozen ones are left out.
        weight_decay: of the first group.

    Raises:
        ConfigError: a negative or not finite weight decay.
    """
    if not math.isfinite(weight_decay) or weight_decay < 0.0:
        raise ConfigError(f"weight_decay: expected a number that is 0 or greater, got {weight_decay!r}")
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if is_decayed(name, parameter)]
    others = [parameter for name, parameter in trained if not is_decayed(name, parameter)]
    groups = [(decayed, weight_decay), (others, 0.0)]
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]
