"""hotswap_adapter: replaces a loaded adapter's values by another's. PEFT's function of this name takes LoRA only."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn

from doran_core.errors import ConfigError, DoranError, MissingKeyError, TensorShapeError, UnexpectedKeyError
from doran_core.method.config import DoranConfig as CoreConfig
from doran_core.support.torch_internals import uncompiled
from doran_hf.base_check import check_base
from doran_hf.config import DoranConfig
from doran_hf.layer import check_adapter, doran_layers

__all__ = ["hotswap_adapter"]

_MAY_DIFFER = {"target_modules", "exclude_modules", "dropout", "expert_mask", "expert_dropout", "factor_penalty"}
"""Options that do not change what given tensors compute. The adapted layers are visible in the tensors."""
_BESIDE = ("bias", "trainable_token_indices", "layer_replication")
"""PEFT fields that add other tensors to an adapter, or change the model."""


@torch.no_grad()
def hotswap_adapter(model: Any, path: str, adapter_name: str = "default", **download: Any) -> None:
    """Copy the values of a saved adapter into a loaded one. The memory stays the same, so a compiled model does not
    recompile.

    Args:
        model: a PeftModel, compiled or not.
        path: directory or hub name of the saved adapter. It adapts the same layers with the same options and ranks.
        adapter_name: the adapter that is replaced; its name stays.
        download: for the hub, as for ``PeftModel.from_pretrained``.

    Raises:
        ConfigError: no such adapter, or a saved one with other options, all of them named.
        MissingKeyError, UnexpectedKeyError, TensorShapeError: tensors of other layers or sizes.
        BaseMismatchError: it was made for another base.
        DoranError: the adapter is merged.

    After an error the adapter is unchanged.
    """
    model = uncompiled(model)
    check_adapter(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in doran_layers(model, adapter_name)):
        raise DoranError(f"the adapter {adapter_name!r} is merged: unmerge it (unmerge_adapter) before swapping it")
    config = DoranConfig.from_pretrained(path, **download)
    _check_options(model.peft_config[adapter_name], config, path)
    tensors = load_peft_weights(path, device="cpu", **download)
    _check_tensors(model, adapter_name, tensors, path)
    check_base(model, adapter_name, config)  # after the names: the fingerprint covers the adapted layers
    set_peft_model_state_dict(model, tensors, adapter_name)


def _check_options(now: Any, saved: Any, path: str) -> None:
    if not isinstance(saved, DoranConfig):
        raise ConfigError(f"{path}: peft_type {saved.peft_type}, expected DORAN")
    core = {field.name for field in dataclasses.fields(CoreConfig)} - _MAY_DIFFER
    other = [
        f"{name}={getattr(saved, name)!r} (here {getattr(now, name)!r})"
        for name in [*sorted(core), *_BESIDE]
        if (getattr(saved, name) or None) != (getattr(now, name) or None)
    ]
    if other:
        raise ConfigError(
            f"{path}: its options differ from the loaded adapter's: {', '.join(other)}; load it under a new name"
        )


def _check_tensors(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor], path: str) -> None:
    """Check before copying: PyTorch would copy matching tensors and raise afterwards."""
    kept, prefix = ".doran_adapter.", "base_model.model."
    container = f"{kept}{adapter_name}."
    expected = {
        key.removeprefix(prefix).replace(container, kept): tensor.shape
        for key, tensor in model.state_dict().items()
        if container in key
    }
    found = {key.removeprefix(prefix): tensor.shape for key, tensor in tensors.items() if kept in key}
    if missing := sorted(expected.keys() - found.keys()):
        raise MissingKeyError(f"{path}: {len(missing)} tensors are missing, such as {missing[0]!r}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise UnexpectedKeyError(f"{path}: the adapter {adapter_name!r} has no tensor {unknown[0]!r}")
    for key, shape in found.items():
        if shape != expected[key]:
            raise TensorShapeError(f"{path}: {key!r} has shape {list(shape)}, expected {list(expected[key])}")
