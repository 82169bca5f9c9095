"""Write adapter directories: all checks first, then one atomic step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from doran_core.adapter.digest import sealed, with_scales_of
from doran_core.adapter.fields import check_fields
from doran_core.adapter.keys import check_readable, is_saved_whole, trainable_key
from doran_core.adapter.peft_files import peft_parts
from doran_core.adapter.schema import (
    ADAPTER_FILES,
    CONFIG_FILE,
    FORMAT_VERSION,
    KEY_PREFIX,
    SCALE_FILE,
    TENSOR_FILE,
    FoldedAdapter,
    TrainableAdapter,
)
from doran_core.adapter.validate import (
    check_folded_parts,
    check_pair,
    check_rows,
    check_tensors,
    check_trainable_modules,
)
from doran_core.errors import DoranError, MissingKeyError
from doran_core.files import StrPath
from doran_core.files.atomic import new_directory
from doran_core.files.jsonfile import write_json
from doran_core.files.tensors import save_safetensors

__all__ = ["write_folded", "write_peft_dora", "write_trainable"]

_SAFETENSORS_METADATA = {"format": "pt"}


def write_trainable(adapter: TrainableAdapter, directory: StrPath, *, overwrite: bool = False) -> Path:
    """Write the trainable form.

    Args:
        adapter: what to write.
        directory: created if missing. Files in it that belong to no adapter stay.
        overwrite: replace an existing adapter.

    Returns:
        The directory.

    Raises:
        AdapterFormatError: the record is not a valid adapter; nothing is written.
        DoranError: the directory holds an adapter that may not be replaced.
        CheckpointError: it cannot be written.
    """
    where = "adapter to write"
    if not adapter.modules:
        raise MissingKeyError(f"{where}: no adapted module")
    check_trainable_modules(where, adapter.config, adapter.modules)
    flat = {
        trainable_key(name, part): tensor
        for name, tensors in adapter.modules.items()
        for part, tensor in tensors.items()
    }
    check_tensors(where, flat)
    flat |= _extra_keys(where, adapter.extra)
    check_readable(where, flat, "trainable", adapter.modules, adapter.extra)
    fields: dict[str, Any] = {
        "peft_type": "DORAN",
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": adapter.base_model,
        "base_fingerprint": adapter.base_fingerprint,
        "created_by": adapter.created_by,
        "task_type": adapter.task_type,
        "inference_mode": True,
        "bias": "none",
        **adapter.peft_fields,
        **adapter.config.to_dict(),
    }
    if adapter.module_kinds:
        fields["module_kinds"] = dict(adapter.module_kinds)
    fields |= {"ties": _names(adapter.ties), "stored_names": _names(adapter.stored_names)}
    if adapter.stored_experts:
        fields["stored_experts"] = dict(adapter.stored_experts)
    fields = sealed(fields, flat)
    check_fields(where, fields)
    _check_replaceable(Path(directory), overwrite)
    with new_directory(Path(directory), overwrite=overwrite, owned=ADAPTER_FILES) as staging:
        write_json(staging / CONFIG_FILE, fields)
        save_safetensors(staging / TENSOR_FILE, flat, _SAFETENSORS_METADATA)
    return Path(directory)


def _names(recorded: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if recorded is None else dict(recorded)


def _check_replaceable(directory: Path, overwrite: bool) -> None:
    if not overwrite and any((directory / name).exists() for name in ADAPTER_FILES):
        raise DoranError(f"{directory} already holds an adapter; pass overwrite=True to replace it")


def write_folded(adapter: FoldedAdapter, directory: StrPath, *, overwrite: bool = False) -> Path:
    """Write the folded form: a valid PEFT DoRA adapter with the output scales beside it.

    Args, Returns, Raises: as :func:`write_trainable`.
    """
    return _write(adapter, directory, overwrite, with_scales=True)


def write_peft_dora(adapter: FoldedAdapter, directory: StrPath, *, overwrite: bool = False) -> Path:
    """Write a plain PEFT DoRA adapter: the folded form without its scales and its base fingerprint.

    Args, Returns, Raises: as :func:`write_trainable`.
    """
    return _write(adapter, directory, overwrite, with_scales=False)


def _write(adapter: FoldedAdapter, directory: StrPath, overwrite: bool, *, with_scales: bool) -> Path:
    flat, scales = _folded_tensors(adapter)
    config = _dora_config(adapter)
    _check_replaceable(Path(directory), overwrite)
    with new_directory(Path(directory), overwrite=overwrite, owned=ADAPTER_FILES) as staging:
        write_json(staging / CONFIG_FILE, config)
        if not with_scales:
            save_safetensors(staging / TENSOR_FILE, flat, sealed(_SAFETENSORS_METADATA, flat, config))
            return Path(directory)
        metadata = _metadata(adapter, save_safetensors(staging / TENSOR_FILE, flat, _SAFETENSORS_METADATA))
        both = with_scales_of(flat, scales)
        save_safetensors(staging / SCALE_FILE, scales, sealed(metadata, both, config))
    return Path(directory)


def _metadata(adapter: FoldedAdapter, tensor_file_sha256: str) -> dict[str, str]:
    """The scale file's metadata without its digests."""
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "form": "folded",
        "created_by": adapter.created_by,
        "module_kinds": json.dumps({name: m.kind for name, m in adapter.modules.items() if m.kind != "linear"}),
        "adapter_model_sha256": tensor_file_sha256,
    }
    if adapter.base_fingerprint is not None:
        metadata["base_fingerprint"] = adapter.base_fingerprint
    for name, recorded in (("ties", adapter.ties), ("stored_names", adapter.stored_names)):
        if recorded is not None:
            metadata[name] = json.dumps(dict(recorded))
    return metadata


def _folded_tensors(adapter: FoldedAdapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the two files by key, checked."""
    where = "adapter to write"
    if not adapter.modules:
        raise MissingKeyError(f"{where}: no adapted module")
    flat: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        check_pair(where, name, module.A, module.B, module.rank)
        check_folded_parts(where, name, module.B, module.scale, module.magnitude)
        check_rows(where, name, module.zero_rows)
        parts = peft_parts(module.kind, module.kernel, module.A, module.B, module.magnitude)
        flat |= {f"{KEY_PREFIX}{name}.{part}": tensor for part, tensor in parts.items()}
    scales = {name: module.scale for name, module in adapter.modules.items()}
    check_tensors(where, flat)
    check_tensors(where, scales)
    # PEFT keeps an adapted module's own bias one level down.
    extra = {_below_base_layer(name, adapter.modules): tensor for name, tensor in adapter.extra.items()}
    flat |= _extra_keys(where, extra)
    check_readable(where, flat, "peft", adapter.modules, adapter.extra)
    return flat, scales


def _below_base_layer(name: str, modules: Mapping[str, object]) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{module}.base_layer.{parameter}" if module in modules else name


def _extra_keys(where: str, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    check_tensors(where, extra, integers=True)
    return {f"{KEY_PREFIX}{name}": tensor for name, tensor in extra.items()}


def _dora_config(adapter: FoldedAdapter) -> dict[str, Any]:
    """A LoraConfig under which PEFT's scaling is exactly 1 for every module."""
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "use_dora": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(adapter.modules),
        "modules_to_save": adapter.modules_to_save,
        "fan_in_fan_out": any(module.kind == "conv1d" for module in adapter.modules.values()),
        "lora_dropout": 0.0,
        "bias": "all" if any(_is_plain_bias(name, adapter) for name in adapter.extra) else "none",
        "use_rslora": False,
        "init_lora_weights": True,
    }


def _is_plain_bias(name: str, adapter: FoldedAdapter) -> bool:
    """Whether an extra tensor is a trained bias, and not part of a module that is saved in full."""
    return name.endswith(".bias") and not is_saved_whole(name, adapter.modules_to_save or [])
