"""Folds the adapter of a model in memory, for an engine to serve; reads no checkpoint files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from doran_core.adapter import FoldedAdapter, FoldedModule, write_folded
from doran_core.adapter.folded import fold_module
from doran_core.errors import ConfigError
from doran_core.support.sharding import gathered
from doran_hf.base_check import base_fingerprint, base_ties, module_kinds, stored_names
from doran_hf.layer import DoranLayer, check_adapter, doran_layers

__all__ = ["save_folded"]

_BESIDE = ("modules_to_save", "trainable_token_indices", "layer_replication")
"""PEFT fields that change parameters shared by all requests of an engine."""


@torch.no_grad()
def save_folded(model: Any, directory: str | os.PathLike[str], adapter_name: str | None = None) -> Path:
    """Write the current adapter in the folded form: A, B and c of each layer, which vLLM loads directly.

    `save_pretrained` writes the trainable form, which an engine must fold with the checkpoint's files. This function
    computes the norm from the weights in memory (for a quantized base through the layer's own product, as in
    training). The model is not merged and trains on. An RL loop calls this before each rollout and passes the
    directory to ``doran_serve.reload_adapter``.

    Args:
        model: a PeftModel. Under FSDP2 and ZeRO-3 all processes call this, each with a directory of its own.
        directory: replaced if it holds an adapter.
        adapter_name: which adapter; None for the active one.

    Returns:
        `directory`.

    Raises:
        ConfigError: no such adapter; several are active and none was named; or it changes more than linear layers
            (biases, modules_to_save, tokens, embeddings, convolutions), which requests of one engine share.
        TargetError: an adapted layer gives no access to its weight and is no quantized one.
        NonFiniteError: a value is NaN or infinite; nothing is written then.
    """
    name = _the_one(model, adapter_name)
    config = model.peft_config[name]
    beside = [field for field in _BESIDE if getattr(config, field, None)]
    if config.bias != "none" or beside:
        given = ", ".join([*beside, *(["bias"] if config.bias != "none" else [])])
        raise ConfigError(
            f"adapter {name!r}: {given}: trains more than the adapted layers, which all requests of an engine share; "
            "leave this out, or merge the policy into the engine's weights"
        )
    kinds = module_kinds(model, name)
    if other := {layer: kind for layer, kind in kinds.items() if kind != "conv1d"}:
        raise ConfigError(f"adapter {name!r}: adapts {other}; an engine's requests adapt linear layers alone")
    record = FoldedAdapter(
        {layer.name: _folded(layer, name, kinds.get(layer.name, "linear")) for layer in doran_layers(model, name)},
        base_fingerprint=base_fingerprint(model, name),
        base_model=config.base_model_name_or_path,
        task_type=None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type)),
        ties=base_ties(model),
        stored_names=stored_names(model, name),
    )
    return write_folded(record, directory, overwrite=True)


def _the_one(model: Any, adapter_name: str | None) -> str:
    if adapter_name is None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise ConfigError(f"adapter_name: the active adapters are {active}; name the one to write")
        adapter_name = active[0]
    check_adapter(model, adapter_name)
    return str(adapter_name)


def _folded(layer: DoranLayer, adapter_name: str, kind: Any) -> FoldedModule:
    adapter, view = layer.adapter(adapter_name), layer.view
    with layer.whole_weight() as weight, gathered(layer.doran_adapter, recurse=True):
        if weight is not None:
            return fold_module(layer.name, adapter, weight, kind=kind)
        # Quantized: compute the norm as in training, with the layer's own product.
        with adapter.inference_mode_of_method():
            A, B = adapter.factor_pair()
        norm = adapter.norm(view, A, B)
        scale = adapter.output_scale(norm)
    A, B, scale, magnitude = (
        part.detach().float().cpu().contiguous() for part in (A, B * adapter.scaling, scale, scale * norm)
    )
    return FoldedModule(layer.name, A, B, scale, magnitude)
