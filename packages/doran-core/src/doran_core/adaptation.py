"""``adapt(model, config)`` and ``load(model, path)``: put DoRAN into a plain nn.Module, new or from its files."""

from __future__ import annotations

import os
from collections.abc import Collection

from torch import nn

from doran_core import kernels
from doran_core.errors import TargetError
from doran_core.handle import DoranHandle, read_trainable, set_trained
from doran_core.layers.modules import AdaptedLayer, make_factor_builder, wrap
from doran_core.layers.statistics import keep_statistics
from doran_core.layers.traced import share_blocks
from doran_core.layers.uncalled import pad_encoders
from doran_core.method.config import DoranConfig
from doran_core.method.factors import FactorBuilder
from doran_core.support.names import plain_modules
from doran_core.targets import find_targets, matches

__all__ = ["adapt", "load"]


def adapt(model: nn.Module, config: DoranConfig, *, factor_builder: FactorBuilder | None = None) -> DoranHandle:
    """Adapt a model in place: freeze it, and wrap the target modules.

    Args:
        model: any nn.Module. All parameters except those of ``config.modules_to_save`` are frozen.
        config: the options; ``target_modules`` must be given.
        factor_builder: makes the factors of each layer with your own generator
            (:class:`~doran_core.method.factors.FactorGenerator`); by default the config decides.

    Returns:
        The handle.

    Raises:
        TargetError: the targets match nothing or a module that DoRAN cannot adapt, or the model is adapted already.
    """
    return _adapt(model, config, factor_builder)


def _adapt(
    model: nn.Module, config: DoranConfig, factor_builder: FactorBuilder | None, known: Collection[str] = ()
) -> DoranHandle:
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise TargetError(f"this {type(model).__name__} is adapted already; call remove() on its handle first")
    names = find_targets(model, config, known)
    modules = plain_modules(model)
    saved = _modules_to_save(model, config)
    builder = factor_builder or make_factor_builder(config)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers: dict[str, AdaptedLayer] = {}
    try:
        for name in names:
            layers[name] = wrap(modules[name], config, name=name, factor_builder=builder)
            layers[name].train(layers[name].base_layer.training)
    except Exception:
        set_trained(trained)
        raise
    places = _places(model, layers)
    model.requires_grad_(False)
    for place, layer in places:
        model.set_submodule(place, layer)
    pad_encoders(model, layers.values())
    keep_statistics(model)
    for name in saved:
        modules[name].requires_grad_(True)
    kernels.prepare(model)
    share_blocks(model)
    return DoranHandle(model, config, layers, saved, places, trained)


def _places(model: nn.Module, layers: dict[str, AdaptedLayer]) -> list[tuple[str, AdaptedLayer]]:
    """Every name under which the model holds a wrapped layer's base: a module may have several."""
    wrappers = {id(layer.base_layer): layer for layer in layers.values()}
    return [
        (name, wrappers[id(module)])
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in wrappers
    ]


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    factor_builder: FactorBuilder | None = None,
    allow_base_mismatch: bool = False,
) -> DoranHandle:
    """Adapt a model with a saved trainable adapter.

    Args:
        model: the base model that the adapter was made for.
        path: the adapter's directory.
        factor_builder: the one that the adapter was trained with, if any.
        allow_base_mismatch: load even if the fingerprints of the base weights differ.

    Raises:
        AdapterFormatError: if the directory is not a trainable adapter, or does not fit the model.
        BaseMismatchError: if the fingerprints of the base weights differ.
    """
    saved = read_trainable(path)
    if stack := next((name for name, parts in saved.modules.items() if parts["magnitude"].dim() == 2), None):
        raise TargetError(
            f"{path}: adapts the stacked expert weights {stack}, which takes the experts module's own routing: load it "
            "with doran-hf (PeftModel.from_pretrained), or merge it into the checkpoint (doran merge)"
        )
    handle = _adapt(model, saved.config, factor_builder, saved.modules)
    try:
        handle.load_record(saved, path, allow_base_mismatch)
    except Exception:
        handle.remove()
        raise
    return handle


def _modules_to_save(model: nn.Module, config: DoranConfig) -> list[str]:
    names = [name for name in plain_modules(model) if name and matches(name, config.modules_to_save)]
    for entry in config.modules_to_save or []:
        if not any(matches(name, [entry]) for name in names):
            raise TargetError(f"modules_to_save: {entry!r} matches no module of this {type(model).__name__}")
    return names
