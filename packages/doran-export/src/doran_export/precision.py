"""The precisions of an exported graph: what torch dtype each is traced in and how near to PyTorch it must be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from doran_core.errors import ConfigError

__all__ = ["PRECISIONS", "Precision", "precision_for"]


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        name: what users say.
        dtype: the weights' dtype while tracing.
        tolerance: largest allowed difference of an output from PyTorch's in float32, in units of the output's largest
            value where that is over 1.
    """

    name: str
    dtype: torch.dtype
    tolerance: float


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", torch.float32, 1e-3),
}
"""Every precision by name."""


def precision_for(name: str) -> Precision:
    """The precision of a name.

    Raises:
        ConfigError: the name is not known.
    """
    try:
        return PRECISIONS[name]
    except KeyError:
        raise ConfigError(f"precision {name!r} is not known: expected one of {', '.join(PRECISIONS)}") from None
