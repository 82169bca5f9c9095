"""PEFT's LoRA and DoRA files: its key names, patterns and tensor shapes, and the options that cannot be represented."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from doran_core.adapter.fields import TOKENS, TOKENS_ADVICE
from doran_core.adapter.keys import PEFT_PARTS, split_keys
from doran_core.adapter.schema import CONFIG_FILE, Kind, PeftModule
from doran_core.adapter.validate import check_pair, check_vector
from doran_core.errors import AdapterFormatError, MissingKeyError, RankError, TensorShapeError, UnexpectedKeyError
from doran_core.method.config import is_number, is_positive_int, pattern_value
from doran_core.support.patterns import check_ending

__all__ = ["check_peft_options", "parse_peft_modules", "peft_parts"]

_A, _B, _M, _M_WEIGHT, _EMBEDDING_A, _EMBEDDING_B = PEFT_PARTS

_UNDERSTOOD = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "init_lora_weights",
    "bias",
    "modules_to_save",
}
_NO_EFFECT = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "layers_to_transform",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",  # counts only with init_lora_weights="loftq", which is refused
    "eva_config",
    "corda_config",  # likewise
    "lora_ga_config",  # likewise
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}
_EXACT_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that do not change the base weights. All others do."""


def check_peft_options(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a PEFT adapter that is not ``W0 + g B A`` or its DoRA, naming the option.

    Raises:
        AdapterFormatError: an option with a value that changes the function in another way.
    """
    for name in ("use_dora", "use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(name), bool | None):
            raise AdapterFormatError(f"{path}: {name}={config[name]!r}, expected true or false")
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(path, name, config.get(name) or {})
    if config.get(TOKENS):
        raise AdapterFormatError(f"{path}: {TOKENS_ADVICE}")
    for name, value in config.items():
        if name not in _UNDERSTOOD and name not in _NO_EFFECT and value not in (None, False, [], {}, ""):
            raise AdapterFormatError(f"{path}: {name}={value!r} cannot be represented exactly; doran does not know it")
    start = config.get("init_lora_weights", True)
    if start not in _EXACT_STARTS:
        raise AdapterFormatError(
            f"{path}: init_lora_weights={start!r} changes the base weights, so that the adapter does not fit the "
            "original ones; convert it to an ordinary LoRA with PEFT first"
        )


def _check_pattern(path: Path, name: str, patterns: object) -> None:
    if not isinstance(patterns, dict):
        raise AdapterFormatError(f"{path}: {name}={patterns!r}, expected an object of name patterns and numbers")
    for pattern in patterns:
        try:
            check_ending(pattern)
        except ValueError as error:
            raise AdapterFormatError(f"{path}: {name}: {error}") from error


def parse_peft_modules(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, PeftModule], dict[str, Tensor]]:
    """Modules and extra tensors of a LoRA or DoRA file, shapes and ranks checked.

    Args:
        path: the tensor file, for messages.
        config: adapter_config.json.
        tensors: by key.
    """
    grouped, extra = split_keys(path, tensors, "peft")
    if not grouped:
        raise MissingKeyError(f"{path}: holds no lora_A and lora_B of any module")
    return {name: _module(path, config, name, parts) for name, parts in grouped.items()}, extra


def _module(path: Path, config: Mapping[str, Any], name: str, parts: dict[str, Tensor]) -> PeftModule:
    embedding = _EMBEDDING_A in parts or _EMBEDDING_B in parts
    key_A, key_B = (_EMBEDDING_A, _EMBEDDING_B) if embedding else (_A, _B)
    for key in (key_A, key_B):
        if key not in parts:
            raise MissingKeyError(f"{path}: {name}.{key} is missing")
    if embedding and (_A in parts or _B in parts):
        raise UnexpectedKeyError(f"{path}: {name} has both lora_A and lora_embedding_A")
    A, B = parts[key_A], parts[key_B]
    kind: Kind | None = "embedding" if embedding else None
    kernel = None
    if A.dim() > 2 and not embedding:
        kind, kernel = "conv2d" if A.dim() == 4 else "conv", tuple(A.shape[1:])
        A, B = _flatten_convolution(path, name, A, B)
    check_pair(str(path), name, A, B, _rank(path, config, name))
    magnitude = parts.get(_M, parts.get(_M_WEIGHT))
    if bool(config.get("use_dora")) != (magnitude is not None):
        found = "no " if magnitude is None else "a "
        raise MissingKeyError(
            f"{path}: {name}: {found}lora_magnitude_vector, but {CONFIG_FILE} has use_dora={config.get('use_dora')}"
        )
    if magnitude is not None:
        magnitude = magnitude.flatten() if kernel is not None else magnitude
        check_vector(str(path), f"{name}.{_M}", magnitude, B.shape[0])
    return PeftModule(name, A, B, _scaling(path, config, name), magnitude, kind, kernel)


def _flatten_convolution(path: Path, name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    ones = [1] * (A.dim() - 2)
    if not 3 <= A.dim() <= 5 or list(B.shape[2:]) != ones:
        expected = ", ".join(["[d_out", "r", *map(str, ones)]) + "]"
        raise TensorShapeError(
            f"{path}: {name}: {_A} {list(A.shape)} and {_B} {list(B.shape)}, expected 1 to 3 kernel sizes in the first "
            f"and {expected} for the second"
        )
    return A.flatten(1), B.flatten(1)


def _rank(path: Path, config: Mapping[str, Any], module: str) -> int:
    default: Any = config.get("r")
    rank: object = pattern_value(config.get("rank_pattern") or {}, module, default)
    if not is_positive_int(rank):
        raise RankError(f"{path.with_name(CONFIG_FILE)}: rank {rank!r} for {module}, expected a positive integer")
    return rank


def _scaling(path: Path, config: Mapping[str, Any], module: str) -> float:
    alpha: object = pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    if not is_number(alpha):
        raise AdapterFormatError(f"{path.with_name(CONFIG_FILE)}: lora_alpha {alpha!r} for {module}, expected a number")
    rank = _rank(path, config, module)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def peft_parts(
    kind: Kind, kernel: tuple[int, ...] | None, A: Tensor, B: Tensor, magnitude: Tensor
) -> dict[str, Tensor]:
    """The tensors of one module as PEFT names and shapes them.

    Args:
        kind: of the base layer.
        kernel: ``(in_channels, *kernel)`` of a convolution.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        magnitude: ``[d_out]``.
    """
    if kind == "embedding":
        return {_EMBEDDING_A: A, _EMBEDDING_B: B, _M: magnitude}
    if kind in ("conv2d", "conv"):
        if kernel is None:
            raise TensorShapeError(f"a {kind} module with A {list(A.shape)} needs its kernel's shape")
        ones = [1] * (len(kernel) - 1)
        return {
            _A: A.reshape(A.shape[0], *kernel),
            _B: B.reshape(*B.shape, *ones),
            _M: magnitude.reshape(1, -1, *ones),
        }
    return {_A: A, _B: B, _M: magnitude}
