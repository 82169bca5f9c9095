"""Read an adapter directory of any form. Everything is checked before anything is built."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from doran_core.adapter.digest import (
    DIGEST,
    TENSORS_DIGEST,
    check_fields_digest,
    check_tensors_digest,
    with_scales_of,
)
from doran_core.adapter.fields import CONFIG_FIELDS, check_fields, peft_fields
from doran_core.adapter.keys import (
    TRAINABLE_MARK,
    is_saved_whole,
    split_keys,
    strip_prefix,
    without_wrappers_copies,
)
from doran_core.adapter.peft_files import check_peft_options, parse_peft_modules
from doran_core.adapter.schema import (
    CONFIG_FILE,
    FORMAT_VERSION,
    SCALE_FILE,
    TENSOR_FILE,
    AnyAdapter,
    FoldedAdapter,
    FoldedModule,
    Kind,
    PeftAdapter,
    TrainableAdapter,
)
from doran_core.adapter.validate import check_folded_parts, check_tensors, check_trainable_modules
from doran_core.errors import (
    AdapterFormatError,
    ConfigError,
    CorruptFileError,
    FormatVersionError,
    MissingKeyError,
    UnexpectedKeyError,
)
from doran_core.files import StrPath
from doran_core.files.jsonfile import JSON_LIMIT, parse_json, parse_object
from doran_core.files.opening import OpenDirectory, named_errors, open_regular, read_directory
from doran_core.files.tensors import LoadedFile, load_tensors
from doran_core.method.config import DoranConfig
from doran_core.support.names import plain_name

__all__ = ["read_adapter", "read_folded", "require_adapter_files"]

_logger = logging.getLogger("doran_core")


def read_adapter(directory: StrPath) -> AnyAdapter:
    """Read an adapter directory. If it is replaced meanwhile, read again, so that all files come from one save.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors, and doran_scale.safetensors if folded.

    Returns:
        A TrainableAdapter (``peft_type`` DORAN), a FoldedAdapter (LORA with a scale file beside it), or a
        PeftAdapter (any other LORA).

    Raises:
        AdapterFormatError: one of its subclasses, naming file and key, for everything that can be wrong.
    """
    path = Path(directory)
    with named_errors(path, AdapterFormatError):
        try:
            return read_directory(path, _read)
        except FileNotFoundError as error:
            raise MissingKeyError(f"{path}: no such adapter directory") from error


def _read(folder: OpenDirectory) -> AnyAdapter:
    config = _read_config(folder)
    method = config.get("peft_type")
    if method == "DORAN":
        return _read_trainable(folder, config)
    if method == "LORA":
        peft = _read_peft(folder, config)
        return _folded(folder, *peft) if folder.holds(SCALE_FILE) else peft[0]
    raise AdapterFormatError(f"{folder.path / CONFIG_FILE}: peft_type {method!r}, expected 'DORAN' or 'LORA'")


def read_folded(directory: StrPath) -> FoldedAdapter:
    """Read an adapter directory that must be in the folded form.

    Raises:
        AdapterFormatError: as :func:`read_adapter`; also if the adapter is of another form.
    """
    adapter = read_adapter(directory)
    if not isinstance(adapter, FoldedAdapter):
        form = "trainable" if isinstance(adapter, TrainableAdapter) else "a PEFT adapter without scales"
        raise AdapterFormatError(
            f"{directory}: is {form}, expected the folded form; make it with "
            f"`doran convert {directory} --to folded --base DIR --out DIR`"
        )
    return adapter


@contextmanager
def _named(folder: OpenDirectory, name: str) -> Iterator[None]:
    """Errors of the file system become errors about one file of an adapter directory."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingKeyError(_missing_message(folder, name)) from error
    except OSError as error:
        raise AdapterFormatError(f"{folder.path / name}: cannot be read: {error.strerror or error}") from error


def require_adapter_files(directory: Path) -> None:
    """Refuse a directory whose configuration or tensor file is missing or no regular file, before PEFT opens it.

    Raises:
        MissingKeyError: a file is missing; the message says if a pickle is there instead.
        CorruptFileError: a file is a pipe, a device or a directory.
    """
    for name in (CONFIG_FILE, TENSOR_FILE):
        with named_errors(directory / name):
            try:
                with open_regular(directory / name):
                    continue
            except FileNotFoundError as error:
                with OpenDirectory(directory) as opened:
                    raise MissingKeyError(_missing_message(opened, name)) from error


def _missing_message(folder: OpenDirectory, name: str) -> str:
    pickled = Path(name).with_suffix(".bin").name
    if name == TENSOR_FILE and folder.holds(pickled):
        return (
            f"{folder.path / name} is missing; {pickled} is a pickle, which doran never opens: save it as safetensors"
        )
    return f"{folder.path / name} is missing: not an adapter directory, or not a complete one"


def _read_config(folder: OpenDirectory) -> dict[str, Any]:
    path = folder.path / CONFIG_FILE
    with _named(folder, CONFIG_FILE):
        config = parse_json(path, folder.read(CONFIG_FILE, JSON_LIMIT))
    if "peft_type" not in config:
        raise MissingKeyError(f"{path}: no field 'peft_type'")
    return config


def _read_tensors(folder: OpenDirectory, name: str) -> LoadedFile:
    with _named(folder, name):
        return load_tensors(folder, name)


def _check_version(path: Path, version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise FormatVersionError(f"{path}: format_version {version!r}, expected an integer up to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, the last one that this doran-core "
            "reads; upgrade doran-core"
        )


def _optional_text(path: Path, fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise CorruptFileError(f"{path}: {name}={value!r}, expected a string or null")
    return value


def _saved_modules(path: Path, fields: Mapping[str, Any]) -> list[str] | None:
    names = fields.get("modules_to_save") or None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CorruptFileError(f"{path}: modules_to_save={names!r}, expected a list of module names or null")
    return names


def _module_kinds(path: Path, value: object) -> dict[str, Kind]:
    kinds = get_args(Kind)
    if not isinstance(value, dict) or not all(kind in kinds for kind in value.values()):
        raise CorruptFileError(f"{path}: module_kinds={value!r}, expected module names with one of {list(kinds)} each")
    return value


def _read_trainable(folder: OpenDirectory, fields: dict[str, Any]) -> TrainableAdapter:
    path = folder.path / CONFIG_FILE
    if "format_version" not in fields:
        raise MissingKeyError(f"{path}: no field 'format_version'")
    _check_version(path, fields["format_version"])
    check_fields(str(path), fields)
    try:
        config = DoranConfig.from_dict({name: fields[name] for name in CONFIG_FIELDS})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    file = folder.path / TENSOR_FILE
    loaded = _read_tensors(folder, TENSOR_FILE)
    modules, extra = split_keys(file, without_wrappers_copies(loaded.tensors), "trainable")
    if not modules:
        raise MissingKeyError(f"{file}: holds no tensor of any adapted module (no key with '.{TRAINABLE_MARK}')")
    for name, tensors in modules.items():
        check_tensors(str(file), {f"{name}.{TRAINABLE_MARK}{part}": tensor for part, tensor in tensors.items()})
    check_trainable_modules(str(file), config, modules)
    _check_extra(file, extra, fields)
    kinds = _module_kinds(path, fields.get("module_kinds") or {})
    # The fingerprint covers a compiled model's names, so no comparison is possible.
    named_by_compile = any(plain_name(key) != key for key in loaded.tensors)
    adapter = TrainableAdapter(
        config=config,
        modules=modules,
        extra=extra,
        base_fingerprint=None if named_by_compile else _optional_text(path, fields, "base_fingerprint"),
        base_model=_optional_text(path, fields, "base_model_name_or_path"),
        task_type=_optional_text(path, fields, "task_type"),
        module_kinds={plain_name(name): kind for name, kind in kinds.items()},
        peft_fields=peft_fields(fields),
        ties=_name_map(path, fields, "ties"),
        stored_names=_name_map(path, fields, "stored_names"),
        stored_experts=_stored_experts(path, fields.get("stored_experts") or {}),
        created_by=_optional_text(path, fields, "created_by") or "unknown",
        digest=_optional_text(path, fields, DIGEST),
    )
    # Digests are checked last: the other checks have more helpful messages.
    check_fields_digest(path, fields)
    check_tensors_digest(file, fields, loaded.tensors)
    _check_header(file, loaded.metadata)
    _say_if_unsealed(folder.path, fields)
    return adapter


def _check_header(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse header entries that doran does not write, because no digest covers them."""
    if dict(metadata) not in ({}, {"format": "pt"}):
        raise CorruptFileError(f"{path}: metadata {dict(metadata)!r}, expected {{'format': 'pt'}} or none")


def _say_if_unsealed(folder: Path, fields: Mapping[str, Any]) -> None:
    """Log that an adapter has no digests (format version 1), so damage cannot be detected."""
    if fields.get(DIGEST) is None or fields.get(TENSORS_DIGEST) is None:
        _logger.warning("%s: has no digest, so damage cannot be detected; save it again to add one", folder)


def _name_map(path: Path, fields: Mapping[str, Any], name: str) -> dict[str, str] | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(target, str) for target in value.values()):
        raise CorruptFileError(f"{path}: {name}={value!r}, expected an object of parameter names, or null")
    return value


def _stored_experts(path: Path, value: object) -> dict[str, list[str]]:
    valid = isinstance(value, dict) and all(
        isinstance(names, list) and names and all(isinstance(name, str) and name.count("{}") == 1 for name in names)
        for names in value.values()
    )
    if not valid:
        raise CorruptFileError(
            f"{path}: stored_experts={value!r}, expected for each parameter a list of names with one '{{}}'"
        )
    return dict(value)  # type: ignore[call-overload, no-any-return]


def _check_extra(file: Path, extra: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    """Extra tensors must be explained: by modules_to_save, by trained biases, or as saved embeddings."""
    saved = _saved_modules(file.with_name(CONFIG_FILE), fields) or []
    biases = fields.get("bias") not in (None, "none")
    check_tensors(str(file), extra, integers=True)
    for key in extra:
        explained = is_saved_whole(key, saved) or (biases and key.endswith(".bias"))
        embedding = key.rpartition(".")[0].rpartition(".")[2] in _EMBEDDING_NAMES
        if not explained and not embedding:
            raise UnexpectedKeyError(f"{file}: {key}: belongs to no adapted module and is not in modules_to_save")


_EMBEDDING_NAMES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "tok_embeddings")
"""PEFT saves these in full if they were resized or are targets."""


def _read_peft(folder: OpenDirectory, config: dict[str, Any]) -> tuple[PeftAdapter, LoadedFile]:
    path, file = folder.path / CONFIG_FILE, folder.path / TENSOR_FILE
    check_peft_options(path, config)
    loaded = _read_tensors(folder, TENSOR_FILE)
    modules, extra = parse_peft_modules(file, config, without_wrappers_copies(loaded.tensors))
    check_tensors(str(file), {key: value for key, value in loaded.tensors.items() if strip_prefix(key) not in extra})
    _check_extra(file, extra, config)
    if {DIGEST, TENSORS_DIGEST} & loaded.metadata.keys():  # doran's, converted
        _check_sealed(file, loaded.metadata, loaded.tensors, config)
    adapter = PeftAdapter(
        modules=modules,
        config=config,
        extra=extra,
        base_model=_optional_text(path, config, "base_model_name_or_path"),
        task_type=_optional_text(path, config, "task_type"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        digest=loaded.metadata.get(DIGEST),
    )
    return adapter, loaded


def _folded(folder: OpenDirectory, peft: PeftAdapter, tensor_file: LoadedFile) -> FoldedAdapter:
    config_path, path = folder.path / CONFIG_FILE, folder.path / SCALE_FILE
    scales = _read_tensors(folder, SCALE_FILE)
    check_tensors(str(path), scales.tensors)
    kinds = _scale_metadata(path, scales.metadata, tensor_file)
    recorded = {name: _json_metadata(path, scales.metadata, name) for name in ("ties", "stored_names")}
    missing, left = (
        sorted(peft.modules.keys() - scales.tensors.keys()),
        sorted(scales.tensors.keys() - peft.modules.keys()),
    )
    if missing:
        raise MissingKeyError(f"{path}: no scale for module(s) {missing}")
    if left:
        raise UnexpectedKeyError(f"{path}: scale for {left}, which {TENSOR_FILE} does not adapt")
    modules = {}
    for name, module in peft.modules.items():
        if module.magnitude is None or module.scaling != 1.0:
            raise AdapterFormatError(
                f"{config_path}: {name}: the folded form has use_dora=true and lora_alpha equal to r, "
                f"got use_dora={module.magnitude is not None} and a scaling of {module.scaling}"
            )
        check_folded_parts(str(path), name, module.B, scales.tensors[name], module.magnitude)
        kind = module.kind or kinds.get(name, "linear")
        modules[name] = FoldedModule(
            name, module.A, module.B, scales.tensors[name], module.magnitude, kind, module.kernel
        )
    if scales.metadata["format_version"] == "1":
        _say_if_unsealed(folder.path, scales.metadata)
    else:
        _check_sealed(path, scales.metadata, with_scales_of(tensor_file.tensors, scales.tensors), peft.config)
    return FoldedAdapter(
        modules=modules,
        extra=peft.extra,
        base_fingerprint=scales.metadata.get("base_fingerprint"),
        base_model=peft.base_model,
        task_type=peft.task_type,
        modules_to_save=_saved_modules(config_path, peft.config),
        ties=_name_map(path, recorded, "ties"),
        stored_names=_name_map(path, recorded, "stored_names"),
        created_by=scales.metadata.get("created_by", "unknown"),
        digest=scales.metadata.get(DIGEST),
    )


def _check_sealed(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Refuse a header without both digests, and files that do not match them."""
    for name in (DIGEST, TENSORS_DIGEST):
        if name not in metadata:
            raise MissingKeyError(f"{path}: no {name!r} in its metadata")
    check_fields_digest(path, metadata, config)
    check_tensors_digest(path, metadata, tensors)


def _scale_metadata(path: Path, metadata: Mapping[str, str], tensor_file: LoadedFile) -> dict[str, Kind]:
    """Check the scale file's header and return the kinds of the modules that are not linear."""
    for name in ("format_version", "form", "adapter_model_sha256"):
        if name not in metadata:
            raise MissingKeyError(f"{path}: no {name!r} in its metadata")
    version = metadata["format_version"]
    _check_version(path, int(version) if version.isdecimal() and len(version) < 10 else version)
    if metadata["form"] not in ("folded", "compiled"):  # the form's name before it was "folded"
        raise CorruptFileError(f"{path}: form {metadata['form']!r}, expected 'folded'")
    recorded, found = metadata["adapter_model_sha256"], tensor_file.sha256()
    if found != recorded:
        raise CorruptFileError(
            f"{path}: belongs to another {TENSOR_FILE} (sha256 {recorded}, the one beside it has {found})"
        )
    kinds = _json_metadata(path, metadata, "module_kinds")
    return _module_kinds(path, {} if kinds is None else kinds)


def _json_metadata(path: Path, metadata: Mapping[str, str], name: str) -> Any:
    try:
        return parse_object(metadata.get(name, "null"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: {name} in its metadata is not JSON: {error}") from error
