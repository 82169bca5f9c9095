"""target_parameters: names of stacked expert weights, checked before anything is changed in the model."""

from __future__ import annotations

from torch import nn

from doran_core.errors import TargetError
from doran_core.method.config import ALL_LINEAR
from doran_core.support.names import plain_name
from doran_core.support.sharding import whole_shape
from doran_core.targets import matches, nearest_names
from doran_hf.config import DoranConfig
from doran_hf.expert_layers import DoranStack
from doran_hf.router_layers import is_router

__all__ = ["expand_parameters", "routers_as_modules", "stacked_parameters"]


def stacked_parameters(model: nn.Module) -> list[str]:
    """Names of the stacked weights in a model's experts modules, which declare their layout (``is_transposed``)."""
    return [
        f"{name}.{parameter}"
        for name, module in _holders(model).items()
        if isinstance(vars(module).get("is_transposed"), bool)
        for parameter, weight in module.named_parameters(recurse=False)
        if len(whole_shape(weight)) == 3
    ]


def expand_parameters(config: DoranConfig, model: nn.Module) -> None:
    """Check target_parameters, and replace them by full names if "all-linear" or exclude_modules selects them.

    "all-linear" means all stacked expert weights besides the linear layers, as for PEFT's LoRA.

    Raises:
        TargetError: a name that matches no parameter, or one that is no stack of expert weights.
    """
    stacks, routers = stacked_parameters(model), _router_weights(model)
    if config.target_modules == ALL_LINEAR and not config.target_parameters:
        config.target_parameters = {name for name in stacks if not matches(name, config.exclude_modules)}
        return
    if not config.target_parameters:
        return
    others = {f"{n}.{p}": w for n, m in _holders(model).items() for p, w in m.named_parameters(recurse=False)}
    for entry in sorted(config.target_parameters):
        found = [name for name in others if matches(name, [entry])]
        if not found:
            raise TargetError(
                f"target_parameters: {entry!r} matches no parameter of {type(model).__name__}; "
                f"{nearest_names(entry, stacks) if stacks else 'it has no stacked expert weights'}"
            )
        if wrong := next((name for name in found if name not in stacks and name not in routers), None):
            raise TargetError(
                f"target_parameters: {wrong!r} {list(whole_shape(others[wrong]))} is neither a stack of expert "
                "weights [experts, rows, columns] in one of transformers' experts modules (use_experts_implementation) "
                "nor a router's weight; name ordinary layers in target_modules"
            )
    if config.exclude_modules:
        meant = {name for name in [*stacks, *routers] if matches(name, config.target_parameters)}
        config.target_parameters = {name for name in meant if not matches(name, config.exclude_modules)}


def routers_as_modules(config: DoranConfig, model: nn.Module) -> None:
    """Move the routers among target_parameters to target_modules: a router has the adapter of an ordinary layer.

    Call it after "all-linear" has been replaced by names.
    """
    found = {name for name in _router_weights(model) if matches(name, config.target_parameters)}
    if not found:
        return
    modules = {name for name in _holders(model) if matches(name, config.target_modules)}
    config.target_modules = modules | {name.removesuffix(".weight") for name in found}
    stacks = {name for name in stacked_parameters(model) if matches(name, config.target_parameters)}
    config.target_parameters = stacks or None


def _router_weights(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, module in _holders(model).items() if is_router(module)]


def _holders(model: nn.Module) -> dict[str, nn.Module]:
    """The base model's modules by their names in it, without adapters and what is inside them."""
    held = {plain_name(name).replace(".base_layer", ""): module for name, module in model.named_modules() if name}
    inside = tuple(f"{name}." for name, module in held.items() if isinstance(module, DoranStack))
    return {
        name: module
        for name, module in held.items()
        if not isinstance(module, DoranStack) and not (inside and name.startswith(inside))
    }
