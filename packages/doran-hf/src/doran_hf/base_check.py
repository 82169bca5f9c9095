"""Facts that an adapter records about its base model (fingerprint, layer kinds, ties), and their check on loading."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from doran_core.checkpoint.fingerprint import combine_digests, exact_digest
from doran_core.checkpoint.ties import base_parameter, tied_parameters
from doran_core.errors import BaseMismatchError
from doran_core.support.names import plain_name
from doran_core.support.torch_internals import uncompiled
from doran_hf.config import DoranConfig
from doran_hf.expert_layers import DoranStack
from doran_hf.layer import DoranLayer, doran_layers
from doran_hf.renaming import StoredStack, stored_name, stored_stack

__all__ = [
    "base_fingerprint",
    "base_model",
    "base_ties",
    "check_base",
    "module_kinds",
    "stored_experts",
    "stored_names",
]


def base_fingerprint(model: nn.Module, adapter_name: str) -> str | None:
    """Fingerprint of the weights that this adapter adapts.

    Returns:
        The fingerprint; for sharded or offloaded weights, the one taken when the adapter was made. None if memory does
        not hold the checkpoint's values: float16, quantized, or not loaded (meta device).
    """
    digests = []
    for layer in doran_layers(model, adapter_name):
        digest = layer.base_digest(adapter_name)
        if digest is None:
            return None
        digests.append((layer.name, digest))
    return combine_digests(digests) if digests else None


def _by_compiled_names(model: nn.Module, adapter_name: str) -> str | None:
    """The fingerprint with torch.compile's names, under which earlier versions saved adapters of compiled models."""
    digests = []
    for name, layer in model.named_modules():
        if isinstance(layer, DoranLayer) and adapter_name in layer.doran_adapter:
            weight = layer.original_weight()
            digest = None if weight is None or weight.is_meta else exact_digest(name, weight)
            if digest is None:
                return None
            digests.append((name, digest))
    return combine_digests(digests)


def module_kinds(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Kinds of the adapted layers that are not plain linear ones, by module name; for a stack, the checkpoint's
    layout."""
    kinds: dict[str, str] = {layer.name: layer.view.kind for layer in doran_layers(model, adapter_name)}
    for name, stored in _stored_stacks(model, adapter_name).items():
        kinds[name] = "conv1d" if stored.transposed else "linear"
    return {name: kind for name, kind in kinds.items() if kind not in ("linear", "opaque")}


def stored_experts(model: nn.Module, adapter_name: str) -> dict[str, list[str]]:
    """Checkpoint names of the adapted stacks that the base's checkpoint stores as separate matrices per expert.

    ``{}`` stands for the expert's number. Several names hold parts of an expert's rows, in this order.
    """
    return {name: stored.experts for name, stored in _stored_stacks(model, adapter_name).items() if stored.experts}


def _stored_stacks(model: nn.Module, adapter_name: str) -> dict[str, StoredStack]:
    base = base_model(model)
    stacks = [layer for layer in doran_layers(model, adapter_name) if isinstance(layer, DoranStack)]
    if not isinstance(base, PreTrainedModel):
        return {}
    found = {
        stack.name: stored_stack(
            base, plain_name(stack.name), stack.view.experts, stack.view.d_out, transposed=stack.view.transposed
        )
        for stack in stacks
    }
    return {name: stored for name, stored in found.items() if stored is not None}


def base_ties(model: nn.Module) -> dict[str, str]:
    """Each tied parameter of the base model and its source, by the base model's names."""
    return tied_parameters(base_model(model))


def stored_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Checkpoint names of the parameters that this adapter may change, if transformers renames them on loading.

    Covers adapted weights, tied parameters and modules_to_save, by the base model's names. Empty for models outside
    transformers, and if no name changes.
    """
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        return {}
    ties = base_ties(model)
    adapted = {plain_name(layer.parameter_name) for layer in doran_layers(model, adapter_name)}
    wanted = {*adapted, *ties, *ties.values()}
    saved = [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name, _ in base.named_parameters():
        if name.startswith(tuple(f"{place}." for place in saved)) and (plain := base_parameter(name)) is not None:
            wanted.add(plain)
    stacks = _stored_stacks(model, adapter_name)
    names = {
        parameter: stacks[parameter].name if parameter in stacks else stored_name(base, parameter)
        for parameter in sorted(wanted)
    }
    return {parameter: name for parameter, name in names.items() if name not in (None, parameter)}


def base_model(model: nn.Module) -> nn.Module:
    """The model below PEFT's and torch.compile's wrappers."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base = base.model if isinstance(base, BaseTuner) else base
    return uncompiled(base)


def check_base(model: nn.Module, adapter_name: str, config: DoranConfig) -> None:
    """Refuse a base model that is not the loaded adapter's.

    Raises:
        BaseMismatchError: naming both fingerprints.
    """
    if config.base_fingerprint is None:
        return
    found = base_fingerprint(model, adapter_name)
    if found is not None and found != config.base_fingerprint:
        if config.base_fingerprint == _by_compiled_names(model, adapter_name):
            return
        raise BaseMismatchError(
            f"adapter {adapter_name!r} was made for the base weights {config.base_fingerprint}"
            f"{_of(config.base_model_name_or_path)}, but the weights of this {type(model).__name__} are {found}. To "
            "load it anyway, set base_fingerprint and digest to null in its adapter_config.json"
        )


def _of(name: Any) -> str:
    return f" ({name})" if name else ""
