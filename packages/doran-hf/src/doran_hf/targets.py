"""Target names: filled in if the user gave none, and checked before anything is changed in the model."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from doran_core.errors import TargetError
from doran_core.layers import is_adaptable
from doran_core.method.config import ALL_LINEAR
from doran_core.targets import matches, nearest_names
from doran_hf.config import DoranConfig
from doran_hf.defaults import DEFAULT_TARGETS

__all__ = ["check_targets", "fill_targets"]


def fill_targets(config: DoranConfig, model: nn.Module) -> None:
    """Set the default targets of the model's family if the configuration names none.

    Raises:
        TargetError: if the family has no default.
    """
    if config.target_modules is not None:
        return
    family = getattr(getattr(model, "config", None), "model_type", None)
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
    """Refuse targets that name no module, instead of adapting fewer modules than were asked for.

    Raises:
        TargetError: naming what was not found and the nearest names that are there.
    """
    targets = config.target_modules
    if targets is None or targets == ALL_LINEAR:
        return
    modules = _base_modules(model)
    entries: list[str | list[str]] = [targets] if isinstance(targets, str) else [[entry] for entry in sorted(targets)]
    for entry in entries:
        if not any(matches(name, entry) for name in modules):
            shown = entry if isinstance(entry, str) else entry[0]
            adaptable = [name for name, fits in modules.items() if fits]
            raise TargetError(
                f"target_modules: {shown!r} matches no module of {type(model).__name__}; "
                f"{nearest_names(shown, adaptable)}"
            )


def _base_modules(model: nn.Module) -> dict[str, bool]:
    """Names of the base model's modules, and whether each can be adapted; what is inside adapted layers is left out."""
    names: dict[str, bool] = {}
    inside = ""
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        adapted = isinstance(module, BaseTunerLayer)
        inside = f"{name}." if adapted else ""  # a module's own modules follow it at once
        names[name] = adapted or is_adaptable(module)
    return names
