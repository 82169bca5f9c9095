"""Tensors to and from open files, without numpy: whole safetensors files, and byte ranges of them."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from doran_core.errors import CorruptFileError
from doran_core.files.layout import (
    DTYPES,
    TensorEntry,
    compose_header,
    dtype_name,
    layout_of,
    parse_layout,
    read_header,
)
from doran_core.files.opening import OpenDirectory

__all__ = [
    "LoadedFile",
    "bytes_view",
    "load_tensors",
    "read_rows",
    "save_safetensors",
    "tensor_pieces",
    "write_tensor",
]


@dataclass(frozen=True)
class LoadedFile:
    """All tensors of a safetensors file by key, in the order of their bytes, and its metadata."""

    header: bytes
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def sha256(self) -> str:
        """Digest of the very bytes that were read, in hexadecimal: a pass over all of them."""
        digest = hashlib.sha256(self.header)
        for tensor in self.tensors.values():
            digest.update(bytes_view(tensor))
        return digest.hexdigest()


def load_tensors(directory: OpenDirectory, name: str) -> LoadedFile:
    """Read a whole safetensors file once, each tensor into memory of its own.

    Raises:
        CorruptFileError: truncated, a pickle, not safetensors, a dtype that torch lacks, or larger than this machine's
            memory. OSError: the file cannot be read.
    """
    path = directory.path / name
    with directory.open(name, _memory_limit()) as fd:
        header = read_header(fd)
        layout = parse_layout(path, header, os.fstat(fd).st_size)
        tensors = {}
        for entry in layout.entries.values():  # in the order of their bytes, without gaps
            if entry.dtype not in DTYPES:
                raise CorruptFileError(f"{path}: {entry.key}: dtype {entry.dtype}, expected one of {sorted(DTYPES)}")
            tensors[entry.key] = read_rows(fd, entry)
    return LoadedFile(header, tensors, layout.metadata)


def tensor_pieces(directory: OpenDirectory, name: str) -> Iterator[bytes]:
    """The bytes of a safetensors file, a piece at a time, if its header describes a file of its size.

    Raises:
        CorruptFileError: it does not, or the file is larger than this machine's memory. OSError: it cannot be read.
    """
    path = directory.path / name
    with directory.open(name, _memory_limit()) as fd:
        left = os.fstat(fd).st_size
        layout_of(path, fd)
        while data := os.read(fd, 2**20):
            left -= len(data)
            if left < 0:  # a file that grows all the time would be read without end
                break
            yield data
    if left:
        raise CorruptFileError(f"{path}: its size changed while it was read")


def _memory_limit() -> int:
    """Bytes of this machine's memory: a larger file is never loaded whole."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return 2**40


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file and return the sha256 of its bytes; the same contents give the same bytes.

    Args:
        path: a file that must not exist.
        tensors: any device, strides and dtype that safetensors has.
        metadata: strings for the header.
    """
    dense = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    header, entries = compose_header(
        [(key, dtype_name(t.dtype), tuple(t.shape), t.nbytes) for key, t in dense.items()], metadata
    )
    digest = hashlib.sha256(header)
    with path.open("xb") as file:
        file.write(header)
        for key in entries:
            view = bytes_view(dense[key])
            digest.update(view)
            file.write(view)
    return digest.hexdigest()


def read_rows(fd: int, entry: TensorEntry, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
    """Read some rows (or all) of one tensor.

    Args:
        fd: file descriptor open for reading.
        entry: where the tensor lies; a dtype of `DTYPES`.
        rows: indices along the first dimension, with start and stop set; None for the whole tensor.
        out: contiguous tensor of the result's shape and dtype to read into; a new one by default.

    Returns:
        ``[rows, ...]`` in the file's dtype.

    Raises:
        CorruptFileError: the file ends before the tensor does.
    """
    shape, position = entry.shape, entry.start
    dtype = DTYPES[entry.dtype]
    if rows is not None:
        position += rows.start * math.prod(shape[1:]) * dtype.itemsize
        shape = (rows.stop - rows.start, *shape[1:])
    tensor = torch.empty(shape, dtype=dtype) if out is None else out
    view = bytes_view(tensor)
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], position + done)
        if count == 0:
            raise CorruptFileError(f"{entry.key}: the file ends inside this tensor")
        done += count
    return tensor


def write_tensor(fd: int, tensor: Tensor, position: int) -> None:
    """Write a contiguous CPU tensor's bytes at `position` of an open file."""
    view = bytes_view(tensor.contiguous())
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], position + done)


def bytes_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, shared; valid only while the tensor lives."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    buffer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    buffer._tensor = tensor  # type: ignore[attr-defined]  # keeps the memory alive as long as the view
    return memoryview(buffer).cast("B")
