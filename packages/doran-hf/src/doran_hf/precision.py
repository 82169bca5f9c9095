"""refresh: recomputes values cached from base weights. restore_start: undoes TRL's rounding of an untrained adapter."""

from __future__ import annotations

import torch
from torch import nn

from doran_core import kernels
from doran_core.errors import ConfigError
from doran_hf.layer import check_adapter, doran_layers

__all__ = ["refresh", "restore_start"]


@torch.no_grad()
def restore_start(model: nn.Module, adapter_name: str = "default") -> None:
    """Restore an untrained adapter to float32 and to its exact start at the base model.

    TRL's SFTTrainer rounds every trained parameter on a quantized base to bfloat16, except DoRA's magnitude, which it
    recognises by name. Call this on the trainer's model before training.

    Args:
        model: with DoRAN adapters, wrapped by PEFT or not.
        adapter_name: which adapter.

    Raises:
        ConfigError: no such adapter, or it has been trained (its B is not 0); nothing is changed then.
    """
    check_adapter(model, adapter_name)
    for layer in doran_layers(model, adapter_name):
        if bool(layer.adapter(adapter_name).factor_pair()[1].any()):
            raise ConfigError(
                f"restore_start: the adapter {adapter_name!r} has been trained (B of {layer.name} is not 0); "
                "call this before training"
            )
    for layer in doran_layers(model, adapter_name):
        adapter = layer.adapter(adapter_name)
        adapter.float()
        adapter.initialise(layer.view)


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Recompute all values cached from the base weights and the adapters, ``||W0||^2`` included.

    Call this after writes that PyTorch does not count: through ``.data``, as some moving averages do, or from outside
    of PyTorch. The caches notice all other writes by themselves.

    Args:
        model: with DoRAN adapters, wrapped by PEFT or not; merged layers are left alone.

    Raises:
        ConfigError: the model has no DoRAN adapter.
    """
    check_adapter(model)
    for layer in doran_layers(model):
        if not layer.merged:
            for name in layer.doran_adapter:
                layer.adapter(name).reset_base(layer.view)
    kernels.refresh()
