"""Full tensors of an adapter, such as a trained head: finds the base tensor that each replaces, drops mere copies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from doran_core.checkpoint.checkpoint import Checkpoint, WeightFile
from doran_core.checkpoint.model_names import ModelNames
from doran_core.errors import CheckpointError
from doran_core.files import StrPath

__all__ = ["by_base_names", "extra_keys", "without_copies"]


def without_copies(
    extra: Mapping[str, Tensor], names: ModelNames, weights: Mapping[str, WeightFile], where: StrPath
) -> dict[str, Tensor]:
    """The extra tensors that change the base. PEFT also saves copies: the base weight of an adapted or tied embedding.

    Args:
        extra: by the adapter's names.
        names: the model's parameters in the base.
        weights: where the adapted weights lie in it, by the adapter's names.
        where: the adapter's directory, for messages.

    Raises:
        CheckpointError: one is an adapted weight, and not that of the base.
    """
    own = {name: names.locate(name)[1] for name in extra if names.is_tied(name)} | dict(weights)
    copies = {name for name, tensor in extra.items() if name in own and _equal(own[name], tensor)}
    for name, file in weights.items():
        if name in extra and name not in copies:
            raise CheckpointError(
                f"{where}: brings a base weight of its own for the adapted {name}, of shape "
                f"{list(extra[name].shape)}; it is not that of {file.path}"
            )
    return {name: tensor for name, tensor in extra.items() if name not in copies}


def _equal(file: WeightFile, tensor: Tensor) -> bool:
    return file.entry.shape == tuple(tensor.shape) and torch.equal(file.read().to(tensor.dtype), tensor)


def by_base_names(
    extra: Mapping[str, Tensor], names: ModelNames, weights: Mapping[str, WeightFile], where: StrPath
) -> dict[str, Tensor]:
    """Extra tensors by the names that their parameters have in the checkpoint, or would have where it has none.

    Names may differ by the prefix that the adapted modules show, and by no other: ``head.norm.weight`` is not a base's
    ``norm.weight``.

    Args, Raises: as :func:`without_copies`; refused is also a tensor whose place in the base is not clear.
    """
    shown = {_prefixes(names.nominal(name), file.entry.key) for name, file in weights.items()}
    differences = {pair for pair in shown if pair is not None} or {("", "")}
    named: dict[str, Tensor] = {}
    for name, tensor in extra.items():
        key = names.locate(name)[0] if names.is_tied(name) else _base_name(name, names, differences, where)
        if key in named:
            raise CheckpointError(f"{where}: {name} and another tensor both replace {key} of {names.directory}")
        named[key] = tensor
    return named


def _base_name(name: str, names: ModelNames, differences: set[tuple[str, str]], where: StrPath) -> str:
    usual = names.nominal(name)
    candidates = [base + usual.removeprefix(own) for own, base in differences if usual.startswith(own)]
    found = sorted({key for key in candidates if key in names})
    if len(found) > 1:
        raise CheckpointError(f"{where}: {name} could replace any of {found} in {names.directory}")
    if not found and usual in names:
        raise CheckpointError(
            f"{where}: {name} is new to the model, whose names differ from those in {names.directory} by the "
            f"prefix {sorted(own or base for own, base in differences)}, but it has another tensor of this name"
        )
    return found[0] if found else usual


def _prefixes(name: str, key: str) -> tuple[str, str] | None:
    """The prefixes before the common part of an adapter's name and the base's key; None for a tied weight."""
    if name == key or name.endswith(f".{key}"):
        return name.removesuffix(key), ""
    return ("", key.removesuffix(name)) if key.endswith(f".{name}") else None


def extra_keys(extra: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, str]:
    """For each extra tensor of a BoundAdapter the base tensor that it replaces; absent where there is none."""
    return {name: name for name in extra if name in checkpoint}
