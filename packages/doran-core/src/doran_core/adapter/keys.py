"""Keys of adapter files: split into module and part on reading, joined on writing.

Module names may hold anything, also ``lora_head`` or ``doran_adapter``: a key is a module's if it ends in a known part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

from doran_core.adapter.schema import KEY_PREFIX
from doran_core.errors import UnexpectedKeyError
from doran_core.support.names import plain_name

__all__ = [
    "PEFT_PARTS",
    "TRAINABLE_MARK",
    "check_readable",
    "is_saved_whole",
    "split_keys",
    "strip_prefix",
    "trainable_key",
    "without_wrappers_copies",
]

TRAINABLE_MARK = "doran_adapter."
PEFT_PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "lora_embedding_A",
    "lora_embedding_B",
)
_TRAINABLE_PARTS = ("magnitude", "tau.raw", "experts.coefficients")
_FACTOR_PARTS = "factors."
"""The factor generator names its tensors after this prefix."""

Form = Literal["trainable", "peft"]
_T = TypeVar("_T")


def trainable_key(module: str, part: str) -> str:
    """Key of one tensor of the trainable form."""
    return f"{KEY_PREFIX}{module}.{TRAINABLE_MARK}{part}"


def strip_prefix(key: str) -> str:
    """The key without PEFT's prefix and torch.compile's part."""
    return plain_name(key.removeprefix(KEY_PREFIX))


def is_saved_whole(parameter: str, modules_to_save: Iterable[str]) -> bool:
    """Whether a parameter belongs to a module that ``modules_to_save`` names.

    PEFT matches the end of names: "classifier" also matches DistilBERT's "pre_classifier".
    """
    endings = tuple(name for name in modules_to_save if name)
    return any(
        parameter[:end].endswith(endings) for end, character in enumerate(parameter) if character == "." and endings
    )


def without_wrappers_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without PEFT's extra copies of an embedding in ``modules_to_save``.

    PEFT saves copies after the vocabulary was resized. A copy with other values stays, and a later check refuses it.
    """
    kept = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        plain = ".".join(part for part in parts if part not in ("modules_to_save", "original_module"))
        is_original = plain in tensors and "original_module" in parts
        is_again = plain in tensors and "modules_to_save" in parts and torch.equal(tensors[plain], tensor)
        if not is_original and not is_again:
            kept[key] = tensor
    return kept


def split_keys(where: object, tensors: Mapping[str, _T], form: Form) -> tuple[dict[str, dict[str, _T]], dict[str, _T]]:
    """Sort tensors by module and part.

    Args:
        where: the file, for messages.
        tensors: by key.
        form: "trainable" for keys ``{module}.doran_adapter.{part}``, "peft" for ``{module}.lora_...``.

    Returns:
        Tensors of each module by part, and the extra tensors by the base parameter that each replaces.

    Raises:
        UnexpectedKeyError: a part that no module has, or two keys that name the same tensor.
    """
    modules: dict[str, dict[str, _T]] = {}
    left: dict[str, _T] = {}
    for key, tensor in tensors.items():
        place = _module_and_part(strip_prefix(key), form)
        if place is None:
            left[key] = tensor
            continue
        module, part = place
        _add(where, key, modules.setdefault(module, {}), part, tensor)
    extra: dict[str, _T] = {}
    for key, tensor in left.items():
        _add(where, key, extra, _extra_name(where, key, modules), tensor)
    return modules, extra


def check_readable(
    where: object, keys: Iterable[str], form: Form, modules: Iterable[str], extra: Iterable[str]
) -> None:
    """Refuse to write keys that a reader would assign to other modules or extra tensors.

    Args:
        where: the file or object to be written, for messages.
        keys: of the whole file.
        form: as in :func:`split_keys`.
        modules: names of the adapted modules.
        extra: names of the extra tensors.

    Raises:
        UnexpectedKeyError: names the keys that would not be read back.
    """
    found_modules, found_extra = split_keys(where, dict.fromkeys(keys), form)
    lost = sorted((found_modules.keys() ^ set(modules)) | (found_extra.keys() ^ set(extra)))
    if lost:
        raise UnexpectedKeyError(f"{where}: {lost} cannot be told from other names in an adapter file")


def _add(where: object, key: str, target: dict[str, _T], name: str, tensor: _T) -> None:
    if name in target:
        raise UnexpectedKeyError(f"{where}: {key}: names a tensor that another key already names")
    target[name] = tensor


def _module_and_part(name: str, form: Form) -> tuple[str, str] | None:
    if form == "trainable":
        module, mark, part = name.rpartition(f".{TRAINABLE_MARK}")
        known = part in _TRAINABLE_PARTS or part.startswith(_FACTOR_PARTS)
        return (module, part) if mark and known else None
    part = next((part for part in PEFT_PARTS if name.endswith(f".{part}")), "")
    return (name.removesuffix(f".{part}"), part) if part else None


def _extra_name(where: object, key: str, modules: Mapping[str, object]) -> str:
    """The base parameter that an extra tensor replaces."""
    name = strip_prefix(key)
    segments = name.split(".")
    for position, segment in enumerate(segments):
        if segment.startswith(("lora_", "doran_")) and ".".join(segments[:position]) in modules:
            part = ".".join(segments[position:])
            raise UnexpectedKeyError(f"{where}: {key}: {part!r} is no part of an adapted module in this form")
    if _module_and_part(name, "trainable") or _module_and_part(name, "peft") or "modules_to_save" in segments:
        raise UnexpectedKeyError(f"{where}: {key}: belongs to no module of this adapter's form")
    if any(segment.startswith("trainable_tokens_") for segment in segments):
        raise UnexpectedKeyError(f"{where}: {key}: trained single tokens (trainable_token_indices) are not supported")
    return name.replace(".base_layer.", ".")
