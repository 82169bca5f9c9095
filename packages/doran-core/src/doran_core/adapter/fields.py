"""The required and the optional fields of a trainable adapter_config.json. All others are refused."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from doran_core.adapter.digest import DIGEST, TENSORS_DIGEST
from doran_core.errors import AdapterFormatError, MissingKeyError, UnexpectedKeyError
from doran_core.method.config import NOT_SAVED, DoranConfig

__all__ = ["CONFIG_FIELDS", "TOKENS", "TOKENS_ADVICE", "check_fields", "peft_fields"]

CONFIG_FIELDS = frozenset(field.name for field in dataclasses.fields(DoranConfig)) - NOT_SAVED
"""The method's options. None has a default on reading: a wrong guess would compute another function."""

_OWN_FIELDS = frozenset(
    {
        *("peft_type", "format_version", "base_fingerprint", "created_by", "module_kinds"),
        *("ties", "stored_names", "stored_experts", TENSORS_DIGEST, DIGEST),
    }
)
_RECORD_FIELDS = frozenset({"base_model_name_or_path", "task_type"})

_PEFT_FIELDS = frozenset(
    {
        # every PeftConfig
        "auto_mapping",
        "inference_mode",
        "revision",
        # fields of doran-hf's DoranConfig that PEFT's LoRA has, too
        "bias",
        "fan_in_fan_out",
        "layers_pattern",
        "layers_to_transform",
        "target_parameters",
        # fields of PEFT's other methods that count in training or loading only
        "ensure_weight_tying",
        "runtime_config",
    }
)
TOKENS = "trainable_token_indices"
TOKENS_ADVICE = (
    f"{TOKENS}: doran reads no adapter that trains single tokens from files; load it with PEFT, call "
    "merge_and_unload() and save the model"
)

_PEFT_PREFIX = "peft_"
"""PEFT adds fields with this prefix (``peft_version``). Other fields of a later PEFT must be added to the list."""


def check_fields(where: str, names: Collection[str]) -> None:
    """Refuse a configuration that lacks an option of the method, or has an unknown field.

    Args:
        where: the file, for messages.
        names: its fields.

    Raises:
        MissingKeyError, UnexpectedKeyError: naming the fields, and the known name nearest to an unknown one.
    """
    if TOKENS in names:
        raise AdapterFormatError(f"{where}: {TOKENS_ADVICE}")
    missing = sorted((CONFIG_FIELDS | {"format_version"}) - set(names))
    unknown = sorted(name for name in names if not _is_known(name))
    hints = "; ".join(_hint(name, missing) for name in unknown)
    if missing:
        raise MissingKeyError(f"{where}: no field {', '.join(map(repr, missing))}" + (f"; {hints}" if hints else ""))
    if unknown:
        raise UnexpectedKeyError(f"{where}: {hints}")


def peft_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are PEFT's own."""
    return {name: value for name, value in fields.items() if _is_peft(name)}


def _is_peft(name: str) -> bool:
    return name in _PEFT_FIELDS or (name.startswith(_PEFT_PREFIX) and name not in _OWN_FIELDS)


def _is_known(name: str) -> bool:
    return name in CONFIG_FIELDS | _OWN_FIELDS | _RECORD_FIELDS or _is_peft(name)


def _hint(name: str, missing: Collection[str]) -> str:
    """Hint at the field that an unknown name may stand for; missing fields come first."""
    known = sorted(CONFIG_FIELDS | _OWN_FIELDS | _RECORD_FIELDS | _PEFT_FIELDS)
    near = difflib.get_close_matches(name, sorted(missing), n=1) or difflib.get_close_matches(name, known, n=1)
    return f"unknown field {name!r}" + (f", nearest is {near[0]!r}" if near else "")
