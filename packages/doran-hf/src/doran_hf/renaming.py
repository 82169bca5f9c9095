"""The checkpoint's names of parameters, for models whose tensors transformers renames on loading.

Uses transformers' private ``revert_weight_conversion``, with which ``save_pretrained`` renames. Remove this file when
models report the names under which they are saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

__all__ = ["StoredStack", "stored_name", "stored_stack"]


def stored_name(model: PreTrainedModel, parameter: str) -> str | None:
    """The name that ``save_pretrained`` gives a parameter.

    Args:
        model: as it was loaded, which decides the names.
        parameter: its name in the model.

    Returns:
        The name; None if the checkpoint stores several parameters in one tensor, or this one in another shape.
    """
    value = torch.empty(1, 1, device="meta")
    try:
        stored = revert_weight_conversion(model, {parameter: value})
    except Exception:  # a conversion that needs the values, or their neighbours: not a renaming
        return None
    (name, tensor), *others = stored.items()
    return str(name) if tensor is value and not others else None


@dataclass(frozen=True)
class StoredStack:
    """How a checkpoint holds a stacked parameter.

    Attributes:
        name: the tensor that holds all experts; None if each expert has tensors of its own.
        transposed: whether that tensor is ``[experts, d_in, d_out]``.
        experts: names of one expert's matrices ``[rows, d_in]``, in the order of their rows, with ``{}`` for its
            number; empty if one tensor holds all experts.
    """

    name: str | None = None
    transposed: bool = False
    experts: list[str] = field(default_factory=list)


def stored_stack(
    model: PreTrainedModel, parameter: str, experts: int, rows: int, *, transposed: bool
) -> StoredStack | None:
    """How ``save_pretrained`` stores a stacked parameter, tried on a small tensor whose values number the rows.

    Args:
        model: as it was loaded: the way of loading decides the names.
        parameter: its name in the model.
        experts: how many matrices it has.
        rows: d_out.
        transposed: whether the model has it as ``[experts, d_in, d_out]``.

    Returns:
        None where the tensors hold something else than whole rows of single experts.
    """
    numbers = torch.arange(experts * rows).view(experts, rows, 1).expand(experts, rows, 2)
    try:
        stored = revert_weight_conversion(model, {parameter: numbers.mT if transposed else numbers})
    except Exception:  # a conversion that needs the values of its neighbours, or the real shape
        return None
    if len(stored) == 1:
        (name, tensor), *_ = stored.items()
        for is_transposed, expected in ((False, numbers), (True, numbers.mT)):
            if tensor.shape == expected.shape and torch.equal(tensor, expected):
                return StoredStack(str(name), is_transposed)
    patterns = _expert_patterns(stored, experts, rows)
    return None if patterns is None else StoredStack(experts=patterns)


def _expert_patterns(stored: Mapping[str, Tensor], experts: int, rows: int) -> list[str] | None:
    """The names of one expert's tensors, in the order of their rows; None if a tensor is not one expert's."""
    names: dict[int, dict[int, str]] = {}
    sizes: dict[int, int] = {}
    for name, tensor in stored.items():
        if tensor.dim() != 2 or tensor.shape[1] != 2:
            return None
        number = int(tensor[0, 0])
        if not torch.equal(tensor[:, 0], torch.arange(number, number + len(tensor))):
            return None
        names.setdefault(number % rows, {})[number // rows] = str(name)
        sizes[number % rows] = len(tensor)
    starts = sorted(names)
    whole = [start + sizes[start] for start in starts] == [*starts[1:], rows] and starts[:1] == [0]
    patterns = [_pattern(names[start], experts) for start in starts]
    return [pattern for pattern in patterns if pattern] if whole and all(patterns) else None


def _pattern(names: Mapping[int, str], experts: int) -> str | None:
    """The names of all experts as one, with ``{}`` for the number; None if they differ in anything else."""
    if sorted(names) != list(range(experts)):
        return None
    columns = list(zip(*(names[expert].split(".") for expert in range(experts)), strict=False))
    numbers = tuple(map(str, range(experts)))
    places = [place for place, column in enumerate(columns) if column == numbers]
    if not places:
        return None
    pattern = ".".join("{}" if place == places[-1] else column[0] for place, column in enumerate(columns))
    found = all(pattern.replace("{}", str(expert)) == name for expert, name in names.items())
    return pattern if found else None
