"""Registers DORAN with PEFT, and holds every private name of PEFT, transformers and accelerate that doran-hf uses.

Each entry goes when its library does the same under a public name:

- ``register``: PEFT's ``register_peft_method`` refuses names outside PEFT's enum. One call of it replaces ``register``
  when PEFT accepts methods of other packages.
- ``_maybe_include_all_linear_layers`` of PEFT: the layers that "all-linear" means.
- ``_is_hf_initialized`` of transformers: marks a parameter that was loaded from a checkpoint.
- ``_keys_to_ignore_on_load_missing`` of transformers: patterns of parameters that a checkpoint may lack.
- ``_is_expert_parallel`` of transformers from 5.18 on: whether an experts module holds only a part of the experts.
- ``Trainer._load_from_checkpoint``: loads a checkpoint without training.
- the wrapper of ``PeftModel.load_adapter``: for a given configuration, PEFT opens a pickle without asking the tuner.
  The wrapper goes when PEFT can be told to open safetensors only.
"""

from __future__ import annotations

import copy
import enum
import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from torch import Tensor, nn

from doran_core.errors import DoranError
from doran_core.support.sharding import offload_hook
from doran_core.support.torch_internals import uncompiled
from doran_hf.tensor_file import require_safetensors

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = [
    "PREFIX",
    "DoranPeftType",
    "ignored_if_missing",
    "is_expert_parallel",
    "is_offloaded_and_unhooked",
    "linear_layers",
    "load_checkpoint",
    "register",
    "was_loaded",
]

PREFIX = "doran_"
"""Prefix of the names of DORAN's submodules in an adapted layer."""


class DoranPeftType(str, enum.Enum):  # noqa: UP042 - PEFT takes a member's name from the text "Class.NAME"
    """The value of ``peft_type``: equal to, and hashed as, the string "DORAN", as PEFT's own members are."""

    DORAN = "DORAN"


def register(config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Enter DORAN into PEFT's mappings. Calling it again changes nothing.

    Raises:
        DoranError: if another package has taken the name or the prefix.
    """
    entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_class),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner_class),
        (PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    ]
    key = DoranPeftType.DORAN
    for mapping, value in entries:
        if key in mapping and not _same(mapping[key], value):
            raise DoranError(f"PEFT already knows a method {key.value!r}: {mapping[key]!r}; cannot register {value!r}")
    owner = next((name for name, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == PREFIX), key)
    if owner != key:
        raise DoranError(f"PEFT already uses the prefix {PREFIX!r}, for the method {owner!r}")
    for mapping, value in entries:
        mapping[key] = value
    if not hasattr(PeftModel.load_adapter, _WRAPPED):
        PeftModel.load_adapter = _without_pickles(PeftModel.load_adapter)


_WRAPPED = "doran_hf_wrapped"


def _without_pickles(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftModel.load_adapter`` that refuses a DORAN adapter without safetensors before PEFT opens a file of it."""

    @functools.wraps(stock)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get(adapter_name)
        if config is not None and config.peft_type == DoranPeftType.DORAN:
            download, _ = self._split_kwargs(dict(kwargs))
            require_safetensors(model_id, **download)
        return stock(self, model_id, adapter_name, *args, **kwargs)

    setattr(load_adapter, _WRAPPED, True)
    return load_adapter


def _same(old: Any, new: Any) -> bool:
    """Equal, or the same class from before a reload of the module."""
    if isinstance(old, type) and isinstance(new, type):
        return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)
    return bool(old == new)


def linear_layers(config: PeftConfig, model: nn.Module) -> set[str]:
    """Names of the layers that "all-linear" means in a model, for a configuration with these target_modules."""
    inside = uncompiled(model)  # PEFT does not recognise a compiled model of transformers
    return set(_maybe_include_all_linear_layers(copy.copy(config), inside).target_modules)


def is_expert_parallel(experts: nn.Module) -> bool:
    """Whether this process holds only a part of the experts."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def load_checkpoint(trainer: Trainer, folder: str) -> None:
    """Load an adapter into the model that Trainer trains, without training."""
    trainer._load_from_checkpoint(folder)


def was_loaded(tensor: Tensor) -> bool:
    """Whether transformers has loaded this parameter from a checkpoint; False in models that were not loaded."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def ignored_if_missing(model: nn.Module, name: str) -> bool:
    """Whether a checkpoint may lack this parameter because the model computes it, such as sinusoidal positions."""
    patterns = {
        pattern
        for module in model.modules()
        for pattern in getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
    }
    return any(re.search(pattern, name) for pattern in patterns)


def is_offloaded_and_unhooked(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a device_map offloads a layer's weights, and no hook loads them for a call.

    PEFT removes accelerate's hooks from a model with such a map before it loads an adapter.
    """
    mapped = {"cpu", "disk"} & {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    return bool(mapped) and offload_hook(layer) is None and any(p.is_meta for p in layer.parameters())
