"""Load the values of a saved trainable adapter into a live model; all is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from doran_core.adapter.schema import TrainableAdapter
from doran_core.errors import AdapterFormatError, BaseMismatchError
from doran_core.layers.adapter import DoranAdapter
from doran_core.method.config import DoranConfig
from doran_core.method.sharing import with_shared
from doran_core.support.sharding import shard_like

__all__ = ["apply_adapter"]


@torch.no_grad()
def apply_adapter(
    saved: TrainableAdapter,
    layers: Mapping[str, DoranAdapter],
    trained: Mapping[str, nn.Module],
    config: DoranConfig,
    base_fingerprint: str | None,
    path: Path,
) -> None:
    """Copy the values of a saved adapter into a model's layers, whose order may differ.

    Args:
        saved: the adapter's record.
        layers: the model's adapters by the names of their layers.
        trained: the model's ``modules_to_save`` by their names.
        config: the options that `layers` were made with.
        base_fingerprint: fingerprint of the model's adapted weights; None skips the comparison.
        path: the adapter's directory, for messages.

    Raises:
        BaseMismatchError: the adapter records another fingerprint.
        AdapterFormatError: other modules, shapes, or options that give another function; nothing is changed then.
    """
    missing, unknown = sorted(layers.keys() - saved.modules.keys()), sorted(saved.modules.keys() - layers.keys())
    if missing or unknown:
        raise AdapterFormatError(f"{path}: adapts other modules: missing {missing[:5]}, unknown {unknown[:5]}")
    if saved.base_fingerprint and base_fingerprint and saved.base_fingerprint != base_fingerprint:
        raise BaseMismatchError(
            f"{path}: made for base weights {saved.base_fingerprint}, this model has {base_fingerprint}"
        )
    _check_same_function(config, saved.config, layers, path)
    values = with_shared(saved.modules, config)
    states: list[tuple[str, nn.Module, dict[str, Tensor]]] = [
        (name, adapter, values[name]) for name, adapter in layers.items()
    ]
    for name, module in trained.items():
        prefix = f"{name}."
        extra = {key.removeprefix(prefix): value for key, value in saved.extra.items() if key.startswith(prefix)}
        states.append((name, module, extra))
    for name, module, tensors in states:
        _check_fits(name, module, tensors, path)
    for _, module, tensors in states:
        held = module.state_dict()
        module.load_state_dict({key: shard_like(value, held[key]) for key, value in tensors.items()})


def _check_same_function(here: DoranConfig, saved: DoranConfig, layers: Iterable[str], path: Path) -> None:
    """Refuse values whose shapes fit, but that compute another function with the model's options."""
    differing = [name for name in _FUNCTION_FIELDS if getattr(here, name) != getattr(saved, name)]
    if differing:
        detail = ", ".join(f"{name}: file {getattr(saved, name)!r}, here {getattr(here, name)!r}" for name in differing)
        raise AdapterFormatError(f"{path}: was made with other options ({detail})")
    for name in layers:
        if here.scaling_for(name) != saved.scaling_for(name):
            raise AdapterFormatError(
                f"{path}: {name}: scaling {saved.scaling_for(name):g} in the file, {here.scaling_for(name):g} here"
            )


_FUNCTION_FIELDS = (
    *("tau_kind", "tau_granularity", "factors", "sharing", "share_output"),
    *("block_pattern", "activation", "depth", "experts"),
)
"""Options that change a trained adapter's function and are visible neither in shapes nor in the scaling."""


def _check_fits(where: str, module: nn.Module, values: Mapping[str, Tensor], path: Path) -> None:
    expected = {key: list(value.shape) for key, value in module.state_dict().items()}
    given = {key: list(value.shape) for key, value in values.items()}
    if expected != given:
        wrong = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
        detail = ", ".join(f"{key}: file {given.get(key)}, model {expected.get(key)}" for key in wrong[:5])
        raise AdapterFormatError(f"{path}: does not fit module {where!r} ({detail})")
