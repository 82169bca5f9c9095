"""Target names: filled in if the user gave none, and checked before anything is changed in the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from doran_core.errors import TargetError
from doran_core.layers import is_adaptable
from doran_core.method.config import ALL_LINEAR
from doran_core.support.names import plain_modules, plain_name
from doran_core.targets import matches, nearest_names, shortened, warn_left_out
from doran_hf.config import DoranConfig
from doran_hf.defaults import DEFAULT_TARGETS
from doran_hf.peft_internals import linear_layers
from doran_hf.router_layers import is_router

__all__ = ["check_exclusions", "check_targets", "expand_all_linear", "fill_targets", "refuse_saved"]


def fill_targets(config: DoranConfig, model: nn.Module) -> None:
    """Set the default targets of the model's family if the configuration names none.

    Raises:
        TargetError: if the family has no default.
    """
    if config.target_modules is not None:
        return
    family = getattr(getattr(model, "config", None), "model_type", None)
    if config.target_parameters and family not in DEFAULT_TARGETS:
        config.target_modules = set()
        return
    targets = DEFAULT_TARGETS.get(family) if isinstance(family, str) else None
    modules = _base_modules(model)
    if isinstance(targets, list):
        targets = [target for target in targets if any(matches(name, [target]) for name in modules)]
    if not targets:
        raise TargetError(
            f"no default target_modules for model type {family!r}: set DoranConfig.target_modules; "
            f"{nearest_names('', (name for name, adaptable in modules.items() if adaptable))}"
        )
    config.target_modules = targets if isinstance(targets, str) else set(targets)


def check_targets(config: DoranConfig, model: nn.Module) -> None:
    """Refuse targets that match no module, instead of adapting fewer modules than requested.

    Raises:
        TargetError: names the missing target and the nearest existing names.
    """
    targets = config.target_modules
    if targets is None or targets == ALL_LINEAR:
        return
    modules = _base_modules(model)
    for name in modules:
        if matches(name, targets) and _cannot_be_saved(name, model):
            raise TargetError(
                f"target_modules: PEFT saves the embeddings with an adapter on {name!r}, but this "
                f"{type(model).__name__} has none; put {name!r} into modules_to_save instead"
            )
    entries: list[str | list[str]] = [targets] if isinstance(targets, str) else [[entry] for entry in sorted(targets)]
    for entry in entries:
        if not any(matches(name, entry) for name in modules):
            shown = entry if isinstance(entry, str) else entry[0]
            adaptable = [name for name, fits in modules.items() if fits]
            raise TargetError(
                f"target_modules: {shown!r} matches no module of {type(model).__name__}; "
                f"{nearest_names(shown, adaptable)}"
            )


def expand_all_linear(config: DoranConfig, model: nn.Module, read: Mapping[str, str]) -> None:
    """Replace "all-linear" by the names of the layers, without layers that cannot have an adapter.

    Args:
        config: whose ``target_modules`` are changed if they are "all-linear".
        model: the model.
        read: its layers that are not called, with the reasons.

    Raises:
        TargetError: if no layer is left.
    """
    if config.target_modules != ALL_LINEAR:
        return
    linear = {plain_name(name) for name in linear_layers(config, model)}
    named = [
        name
        for name in plain_modules(model)
        if name in linear and not _is_saved(name, config) and not _cannot_be_saved(name, model)
    ]
    kept = [name for name in named if name not in read]
    warn_left_out(model, (name for name in named if name in read), read, config.target_parameters or ())
    if not kept:
        raise TargetError(f"target_modules={ALL_LINEAR!r}: this {type(model).__name__} has no linear layer to adapt")
    config.target_modules = set(kept)


def check_exclusions(config: DoranConfig, model: nn.Module) -> None:
    """Warn in one line about entries of ``exclude_modules`` that match none of the target modules."""
    targets = [name for name in _base_modules(model) if matches(name, config.target_modules)]
    excluded = config.exclude_modules or []
    entries = [excluded] if isinstance(excluded, str) else [[entry] for entry in sorted(excluded)]
    unused = [
        repr(entry if isinstance(entry, str) else entry[0])
        for entry in entries
        if not any(matches(name, entry) for name in targets)
    ]
    if unused:
        warnings.warn(f"exclude_modules: no target module matches {shortened(unused)}", stacklevel=5)


def _is_saved(name: str, config: DoranConfig) -> bool:
    """Whether PEFT trains this module in full. PEFT matches modules_to_save against the ends of names."""
    parts = name.split(".")
    places = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(place.endswith(entry) for entry in config.modules_to_save or [] for place in places)


def _cannot_be_saved(name: str, model: nn.Module) -> bool:
    """Whether PEFT mistakes a layer for an output embedding by its name, in a model without embeddings (CTC heads)."""
    if name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES or not hasattr(model, "get_input_embeddings"):
        return False
    try:
        model.get_input_embeddings()  # type: ignore[operator]  # torch's stubs take it for a parameter
    except NotImplementedError:
        return True
    return False


def _base_modules(model: nn.Module) -> dict[str, bool]:
    """Names of the base model's modules, without the insides of adapted layers, and whether each can be adapted."""
    names: dict[str, bool] = {}
    inside = ""
    for name, module in plain_modules(model).items():
        if not name or (inside and name.startswith(inside)):
            continue
        adapted = isinstance(module, BaseTunerLayer)
        inside = f"{name}." if adapted else ""  # a module's submodules directly follow it
        names[name] = adapted or is_adaptable(module) or is_router(module)
    return names


def refuse_saved(name: str, config: DoranConfig) -> None:
    """Refuse a target that modules_to_save matches, too.

    PEFT matches modules_to_save against the ends of names, and cannot fully train an adapted module.

    Raises:
        TargetError: naming both.
    """
    for entry in config.modules_to_save or []:
        if name.endswith(entry):
            raise TargetError(
                f"{name}: modules_to_save={entry!r} matches this module, too (PEFT compares the ends of names), so it "
                "trains in full; leave it out of target_modules, or exclude it with exclude_modules"
            )
