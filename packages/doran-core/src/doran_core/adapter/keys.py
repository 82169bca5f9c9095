"""Names of tensors in adapter files: split into module and part on reading, put together on writing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from doran_core.adapter.schema import KEY_PREFIX
from doran_core.errors import UnexpectedKeyError

__all__ = ["split_keys", "strip_prefix", "trainable_key"]

TRAINABLE_MARK = "doran_adapter."
_LORA_MARKS = ("lora_", "doran_")
_T = TypeVar("_T")


def trainable_key(module: str, part: str) -> str:
    """Key of one tensor of the trainable form."""
    return f"{KEY_PREFIX}{module}.{TRAINABLE_MARK}{part}"


def strip_prefix(key: str) -> str:
    """The key without PEFT's prefix, if it has it."""
    return key.removeprefix(KEY_PREFIX)


def split_keys(
    path: Path, tensors: Mapping[str, _T], mark: str, parts: Iterable[str] | None
) -> tuple[dict[str, dict[str, _T]], dict[str, _T]]:
    """Sort tensors by module and part.

    Args:
        path: the file, for messages.
        tensors: by key.
        mark: what stands between module and part, e.g. ``"doran_adapter."``; it stays with the part if it ends in
            an underscore (``"lora_"``).
        parts: the parts that a module may have, or None for any.

    Returns:
        Tensors of each module by part, and the extra tensors by the base parameter that each replaces.

    Raises:
        UnexpectedKeyError: a part that no module has, or two keys that name the same tensor.
    """
    known = None if parts is None else set(parts)
    modules: dict[str, dict[str, _T]] = {}
    extra: dict[str, _T] = {}
    for key, tensor in tensors.items():
        module, found, part = strip_prefix(key).partition(f".{mark}")
        if found:
            part = mark + part if mark.endswith("_") else part
            if known is not None and part not in known:
                raise UnexpectedKeyError(f"{path}: {key}: {part!r} is none of {sorted(known)}")
            target, name = modules.setdefault(module, {}), part
        else:
            target, name = extra, _extra_name(path, key)
        if name in target:
            raise UnexpectedKeyError(f"{path}: {key}: names a tensor that another key already names")
        target[name] = tensor
    return modules, extra


def _extra_name(path: Path, key: str) -> str:
    """The base parameter that an extra tensor replaces."""
    name = strip_prefix(key).replace(".base_layer.", ".")
    segments = name.split(".")
    if any(segment.startswith(_LORA_MARKS) for segment in segments) or "modules_to_save" in segments:
        raise UnexpectedKeyError(f"{path}: {key}: belongs to no module of this adapter's form")
    if any(segment.startswith("trainable_tokens_") for segment in segments):
        raise UnexpectedKeyError(f"{path}: {key}: trained single tokens (trainable_token_indices) are not supported")
    return name
