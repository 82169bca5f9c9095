"""The vLLM objects that this package uses without replacing them, in one table. Imports vLLM only when asked to."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["NAMES", "OPTIONAL_NAMES", "exists", "locate", "lookup", "lookup_optional"]

NAMES = {
    "BaseLinearLayerWithLoRA": "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA",
    "EngineDeadError": "vllm.v1.engine.exceptions:EngineDeadError",
    "EngineCoreOutput": "vllm.v1.engine:EngineCoreOutput",
    "EngineCoreOutputs": "vllm.v1.engine:EngineCoreOutputs",
    "LinearBase": "vllm.model_executor.layers.linear:LinearBase",
    "LoRAAdapterNotFoundError": "vllm.exceptions:LoRAAdapterNotFoundError",
    "LoRALayerWeights": "vllm.lora.lora_weights:LoRALayerWeights",
    "LoRAModel": "vllm.lora.lora_model:LoRAModel",
    "LoRARequest": "vllm.lora.request:LoRARequest",
    "LoRAResolver": "vllm.lora.resolver:LoRAResolver",
    "LoRAResolverRegistry": "vllm.lora.resolver:LoRAResolverRegistry",
    "LRUCacheLoRAModelManager": "vllm.lora.model_manager:LRUCacheLoRAModelManager",
    "ModelRegistry": "vllm.model_executor.models:ModelRegistry",
    "RequestStatus": "vllm.v1.request:RequestStatus",
    "VLLMValidationError": "vllm.exceptions:VLLMValidationError",
    "current_config": "vllm.config.vllm:get_current_vllm_config_or_none",
    "get_adapter_absolute_path": "vllm.lora.utils:get_adapter_absolute_path",
    "main": "vllm.entrypoints.cli.main:main",
    "parse_fine_tuned_lora_name": "vllm.lora.utils:parse_fine_tuned_lora_name",
}

OPTIONAL_NAMES = {
    "pack_experts": "vllm._custom_ops:cpu_prepack_moe_weight",
}
"""Objects that some builds of vLLM lack, and that only some models need."""


def lookup(name: str) -> Any:
    """The vLLM object behind a key of `NAMES`."""
    holder, attribute = locate(NAMES[name])
    return getattr(holder, attribute)


def lookup_optional(name: str) -> Any | None:
    """The vLLM object behind a key of `OPTIONAL_NAMES`; None if this vLLM lacks the object."""
    target = OPTIONAL_NAMES[name]
    if not exists(target):
        return None
    holder, attribute = locate(target)
    return getattr(holder, attribute)


def locate(target: str) -> tuple[Any, str]:
    """The owner of the last attribute of ``module:a.b``, and the attribute's name."""
    module, _, path = target.partition(":")
    holder: Any = importlib.import_module(module)
    *outer, attribute = path.split(".")
    for name in outer:
        holder = getattr(holder, name)
    return holder, attribute


def exists(target: str) -> bool:
    """Whether the installed vLLM has ``module:a.b``."""
    try:
        holder, attribute = locate(target)
    except (ImportError, AttributeError):
        return False
    return hasattr(holder, attribute)
