"""Digests over the contents of an adapter directory: damage, and mixtures of two saves, are refused.

``tensors_digest`` covers every tensor; ``digest`` covers every other field, ``tensors_digest`` among them. So the
fields can be checked alone, and the tensors against the fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from doran_core.adapter.schema import CONFIG_FILE, SCALE_FILE, TENSOR_FILE
from doran_core.errors import AdapterFormatError, CorruptFileError
from doran_core.files import StrPath
from doran_core.files.jsonfile import JSON_LIMIT, parse_json, read_json, write_json
from doran_core.files.layout import dtype_name
from doran_core.files.opening import OpenDirectory, named_errors, read_directory
from doran_core.files.tensors import bytes_view, load_tensors, tensor_pieces

__all__ = [
    "DIGEST",
    "TENSORS_DIGEST",
    "check_directory",
    "check_fields_digest",
    "check_tensors_digest",
    "directory_digest",
    "fields_digest",
    "files_digest",
    "seal_directory",
    "sealed",
    "tensors_digest",
    "with_scales_of",
]

DIGEST = "digest"
TENSORS_DIGEST = "tensors_digest"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """``"sha256:"`` and 64 hexadecimal digits over key, dtype, shape and bytes of each tensor, in any order."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        dense = tensors[key].detach().to("cpu").contiguous()
        total.update(json.dumps([key, dtype_name(dense.dtype), list(dense.shape)]).encode() + b"\0")
        total.update(bytes_view(dense))
    return f"sha256:{total.hexdigest()}"


def with_scales_of(tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folded adapter's two files under one set of keys."""
    return {**tensors, **{f"{SCALE_FILE}:{name}": scale for name, scale in scales.items()}}


def fields_digest(fields: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> str:
    """Digest of JSON-ready fields, except ``digest`` itself.

    Args:
        fields: of one file, among them ``tensors_digest``.
        beside: fields of the second file, if the adapter has one.
    """
    covered = {name: value for name, value in fields.items() if name != DIGEST}
    text = json.dumps([covered, beside], sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def sealed(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], beside: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields with both digests, to write.

    Args:
        fields: as in :func:`fields_digest`.
        tensors: all tensors of the directory, by key.
        beside: as in :func:`fields_digest`.
    """
    with_tensors = {**fields, TENSORS_DIGEST: tensors_digest(tensors)}
    return {**with_tensors, DIGEST: fields_digest(with_tensors, beside)}


def check_fields_digest(where: StrPath, fields: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> None:
    """Refuse fields that changed since they were written. Fields without a digest pass.

    Args:
        where: the file, for the message.
        fields: as in :func:`fields_digest`, as they were read.
        beside: likewise.

    Raises:
        CorruptFileError: the digests differ.
    """
    recorded = fields.get(DIGEST)
    if recorded is None:
        return
    found = fields_digest(fields, beside)
    if found != recorded:
        raise CorruptFileError(
            f"{where}: damaged, or edited by hand: its fields have the digest {found}, it records {recorded!r}; after "
            f"an edit on purpose, delete its field {DIGEST!r}"
        )


def check_tensors_digest(where: StrPath, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that do not belong to these fields. Fields without a tensor digest pass.

    Args:
        where: the tensors' file, for the message.
        fields: as they were read.
        tensors: all tensors of the directory, by key.

    Raises:
        CorruptFileError: the digests differ.
    """
    recorded = fields.get(TENSORS_DIGEST)
    if recorded is None:
        return
    found = tensors_digest(tensors)
    if found != recorded:
        raise CorruptFileError(
            f"{where}: damaged, or of another save than the file beside it: its tensors have the digest {found}, "
            f"{recorded!r} is recorded"
        )


def check_directory(directory: Path) -> None:
    """Compare the files of a trainable adapter with their digests, for readers other than doran's.

    Raises:
        CorruptFileError: a digest differs, or a file is not what its name says.
        OSError: adapter_config.json cannot be read. Tensors that are not there yet are not checked.
    """
    read_directory(directory, _check_open)


def _check_open(directory: OpenDirectory) -> None:
    path, tensor_file = directory.path / CONFIG_FILE, directory.path / TENSOR_FILE
    fields = parse_json(path, directory.read(CONFIG_FILE, JSON_LIMIT))
    check_fields_digest(path, fields)
    if fields.get(TENSORS_DIGEST) is not None and directory.holds(TENSOR_FILE):
        check_tensors_digest(tensor_file, fields, load_tensors(directory, TENSOR_FILE).tensors)


def seal_directory(directory: Path) -> None:
    """Add digests to an adapter_config.json that another program wrote.

    Without adapter_model.safetensors beside it, the configuration is left without digests.

    Raises:
        CorruptFileError: a file is not what its name says. OSError: a file cannot be read or written.
    """
    path, tensor_file = directory / CONFIG_FILE, directory / TENSOR_FILE
    fields = {name: value for name, value in read_json(path).items() if name not in (DIGEST, TENSORS_DIGEST)}
    if tensor_file.exists():
        with OpenDirectory(directory) as opened:
            fields = sealed(fields, load_tensors(opened, TENSOR_FILE).tensors)
    part = path.with_name(f".{CONFIG_FILE}.part")
    write_json(part, dict(sorted(fields.items())))
    part.replace(path)


def directory_digest(directory: StrPath) -> str:
    """Digest of the current files of an adapter directory of any form, also PEFT's own.

    Args:
        directory: an adapter directory; files that are not an adapter's do not count.

    Raises:
        AdapterFormatError: a file is no regular file, or cannot be read.
    """
    with named_errors(directory, AdapterFormatError):
        return read_directory(Path(directory), files_digest)


def files_digest(directory: OpenDirectory, take: Callable[[str, bytes], object] | None = None) -> str:
    """As :func:`directory_digest`, of a directory held open.

    Args:
        directory: the adapter directory.
        take: called with each piece that is read, in order: the name of its file, and its bytes.

    Raises:
        CorruptFileError: a file is not what its name says. OSError: a file cannot be read.
    """
    total = hashlib.sha256()
    for name in (CONFIG_FILE, TENSOR_FILE, SCALE_FILE):
        if not directory.holds(name):
            continue
        one = hashlib.sha256()
        for data in [directory.read(name, JSON_LIMIT)] if name == CONFIG_FILE else tensor_pieces(directory, name):
            one.update(data)
            if take is not None:
                take(name, data)
        total.update(f"{name}\0{one.hexdigest()}\0".encode())
    return f"sha256:{total.hexdigest()}"
