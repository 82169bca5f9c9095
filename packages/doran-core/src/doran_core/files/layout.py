"""The header of a safetensors file: where each tensor's bytes lie. Parses it, checks it, composes a new one.

The format: 8 bytes little-endian length N, N bytes of JSON (padded with spaces), then the tensors' bytes without gaps.
Having the offsets lets the merge overwrite one tensor inside a copied file and read a few rows of another.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from doran_core.errors import CorruptFileError
from doran_core.files.jsonfile import parse_object
from doran_core.files.opening import open_regular

__all__ = [
    "DTYPES",
    "Layout",
    "TensorEntry",
    "compose_header",
    "dtype_name",
    "layout_of",
    "parse_layout",
    "read_header",
    "read_layout",
]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""safetensors' dtype names and torch's dtypes, of the tensors that can be read."""

_OTHER_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
"""Bits per element of safetensors' other dtypes, whose tensors can only be copied."""

_MAX_HEADER = 100 * 2**20  # the limit that safetensors itself sets
_MAX_DIMENSIONS = 32
_MAX_SIZE = 2**48
"""Largest size of one dimension: beyond it, torch's arithmetic overflows even if another dimension is 0."""
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its key, safetensors dtype name, shape and absolute byte range ``[start, stop)``."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Length of the tensor in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """The header of one file: entries by key in the order of their bytes, and the metadata."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    header_bytes: int
    """Bytes before the first tensor."""


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def read_layout(path: Path) -> Layout:
    """Read and check the header of a safetensors file.

    Raises:
        CorruptFileError: the file is truncated, is a pickle, or is not safetensors. A missing file raises OSError.
    """
    with open_regular(path) as fd:
        return layout_of(path, fd)


def layout_of(path: Path, fd: int) -> Layout:
    """The layout of an open file; `path` is for messages. Raises as :func:`read_layout`."""
    return parse_layout(path, read_header(fd), os.fstat(fd).st_size)


def read_header(fd: int) -> bytes:
    """The bytes before the first tensor of an open file; only the first 8 if they tell of a header beyond its end."""
    head = os.pread(fd, 8, 0)
    length = int.from_bytes(head, "little")
    fits = len(head) == 8 and length <= min(os.fstat(fd).st_size - 8, _MAX_HEADER)
    return head + os.pread(fd, length, 8) if fits else head


def parse_layout(path: Path, data: bytes, size: int) -> Layout:
    """Check the header at the start of `data`, for a file of `size` bytes. Raises as :func:`read_layout`."""
    if size < 8:
        raise CorruptFileError(f"{path}: truncated: {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(data[:8], "little")
    if length > min(size - 8, _MAX_HEADER):
        if _looks_like_pickle(data):
            raise CorruptFileError(f"{path}: is a pickle, not safetensors; doran never opens pickles")
        raise CorruptFileError(f"{path}: truncated, or not safetensors: header of {length} bytes, file of {size}")
    try:
        header = parse_object(data[8 : 8 + length])
        if not isinstance(header, dict) or data[8:9] != b"{":
            raise ValueError("not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must map strings to strings")
        entries = [_entry(path, key, value, 8 + length) for key, value in header.items()]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CorruptFileError):
            raise
        what = "a pickle, not safetensors" if _looks_like_pickle(data) else f"not safetensors: {error}"
        raise CorruptFileError(f"{path}: {what}") from error
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            raise CorruptFileError(f"{path}: {entry.key}: bytes start at {entry.start}, expected {end}")
        end = entry.stop
    if end != size:
        state = "truncated" if end > size else "too long"
        raise CorruptFileError(f"{path}: {state}: {size} bytes, its header describes {end}")
    return Layout(path, {entry.key: entry for entry in entries}, metadata, 8 + length)


def _entry(path: Path, key: str, value: Any, offset: int) -> TensorEntry:
    dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_size, (*shape, start, stop))):
        raise ValueError(f"{key}: expected up to {_MAX_DIMENSIONS} sizes and two offsets, integers from 0 to 2^48")
    bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _OTHER_BITS.get(dtype)
    if bits is None:
        raise CorruptFileError(f"{path}: {key}: dtype {dtype!r}, which safetensors does not have")
    if (stop - start) * 8 != math.prod(shape) * bits:
        raise CorruptFileError(f"{path}: {key}: {stop - start} bytes do not hold {dtype} of shape {shape}")
    return TensorEntry(key, dtype, tuple(shape), offset + start, offset + stop)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_SIZE


def _looks_like_pickle(data: bytes) -> bool:
    zipped = data[:4] == b"PK\x03\x04"  # torch.save since 1.6
    return zipped or (data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def compose_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Lay tensors out in a new file.

    Widest dtypes come first and names are sorted within a dtype, so that every tensor is aligned to its own dtype
    and equal contents give equal bytes.

    Args:
        tensors: key, safetensors dtype name, shape and length in bytes of each.
        metadata: strings for the header.

    Returns:
        The bytes before the first tensor, and the entries in file order.
    """

    def order(tensor: tuple[str, str, tuple[int, ...], int]) -> tuple[int, str]:
        itemsize = DTYPES[tensor[1]].itemsize if tensor[1] in DTYPES else 1
        return -itemsize, tensor[0]

    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    relative: list[TensorEntry] = []
    position = 0
    for key, dtype, shape, nbytes in sorted(tensors, key=order):
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        relative.append(TensorEntry(key, dtype, shape, position, position + nbytes))
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    base = 8 + len(text)
    entries = {e.key: TensorEntry(e.key, e.dtype, e.shape, base + e.start, base + e.stop) for e in relative}
    return len(text).to_bytes(8, "little") + text, entries
