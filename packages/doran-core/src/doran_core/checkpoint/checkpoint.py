"""A Hugging Face checkpoint directory as keys and tensors. Tensors are read from the files on demand."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from doran_core.errors import CheckpointError, CorruptFileError
from doran_core.files import StrPath
from doran_core.files.jsonfile import read_json
from doran_core.files.layout import DTYPES, Layout, TensorEntry, read_layout
from doran_core.files.opening import is_plain_name, named_errors, open_regular
from doran_core.files.tensors import read_rows

__all__ = ["INDEX_FILE", "Checkpoint", "WeightFile"]

INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_CONFIG = "config.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class WeightFile:
    """One tensor's place: the shard's layout and the entry in it."""

    layout: Layout
    entry: TensorEntry

    @property
    def path(self) -> Path:
        """The shard."""
        return self.layout.path

    def rows(self, step: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of `step` rows along the first stored dimension with their values, in the file's dtype.

        The values of one slice are overwritten by those of the next.
        """
        total = self.entry.shape[0]
        buffer = torch.empty((min(step, total), *self.entry.shape[1:]), dtype=DTYPES[self.entry.dtype])
        with open_for_reading(self.path) as fd:
            for start in range(0, total, step):
                part = slice(start, min(start + step, total))
                yield part, read_rows(fd, self.entry, part, out=buffer[: part.stop - start])

    def parts(self) -> list[WeightFile]:
        """The matrices of a tensor of three dimensions, each as a tensor of its own in the same place."""
        entry = self.entry
        size = entry.nbytes // max(1, entry.shape[0])
        starts = (entry.start + size * number for number in range(entry.shape[0]))
        return [replace(self, entry=replace(entry, shape=entry.shape[1:], start=s, stop=s + size)) for s in starts]

    def read(self) -> Tensor:
        """The whole tensor in the file's dtype."""
        with open_for_reading(self.path) as fd:
            return read_rows(fd, self.entry)


@contextmanager
def open_for_reading(path: Path) -> Iterator[int]:
    """A file descriptor of a regular file. A file that cannot be opened or is damaged raises a CheckpointError."""
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(open_regular(path))
        except CorruptFileError as error:
            raise CheckpointError(str(error)) from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        try:
            yield fd
        except CorruptFileError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _state_of(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


class Checkpoint:
    """A directory with ``model.safetensors``, or with shards and ``model.safetensors.index.json``.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: no such directory, no safetensors weights in it, or broken files.
    """

    def __init__(self, directory: StrPath) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{directory}: no such checkpoint directory")
        with named_errors(directory, CheckpointError):
            self._read()

    def _read(self) -> None:
        self.state: dict[str, list[int]] = {}
        """Size, modification time and inode of each file when reading began, by path."""
        for name in (INDEX_FILE, _CONFIG):
            self._note(self.directory / name)
        self.index = self._read_index()
        names = [_SINGLE_FILE] if self.index is None else sorted(set(self.index["weight_map"].values()))
        self.shards: list[Layout] = [self._read_shard(name) for name in names]
        self._files: dict[str, WeightFile] = {}
        for shard in self.shards:
            for key, entry in shard.entries.items():
                if key in self._files:
                    raise CheckpointError(f"{shard.path}: {key} is also in {self._files[key].path.name}")
                self._files[key] = WeightFile(shard, entry)
        self._check_index()

    def _read_index(self) -> dict[str, Any] | None:
        if (self.directory / _SINGLE_FILE).exists():
            return None
        path = self.directory / INDEX_FILE
        if not path.exists():
            hint = ""
            if any((self.directory / name).exists() for name in _PICKLES):
                hint = "; it has pickled weights only, which doran never opens: save it as safetensors"
            raise CheckpointError(f"{self.directory}: no {_SINGLE_FILE} and no {INDEX_FILE} in it{hint}")
        try:
            index = read_json(path)
        except CorruptFileError as error:
            raise CheckpointError(str(error)) from error
        files = index.get("weight_map")
        if not isinstance(files, dict) or not all(
            isinstance(name, str) and is_plain_name(name) for name in files.values()
        ):
            raise CheckpointError(f"{path}: no weight_map from tensor names to files beside it")
        return index

    def _note(self, path: Path) -> None:
        with suppress(OSError):  # the reader says so
            self.state[str(path)] = _state_of(path)

    def require_unchanged(self) -> None:
        """Refuse a result if the checkpoint's files have changed since reading began.

        Raises:
            CheckpointError: naming the file.
        """
        for path, state in self.state.items():
            try:
                now = _state_of(Path(path))
            except OSError:
                now = []
            if now != state:
                raise CheckpointError(f"{path}: changed while it was being read: run this again when it stays as it is")

    def _read_shard(self, name: str) -> Layout:
        path = self.directory / name
        self._note(path)
        try:
            layout = read_layout(path)
            with safe_open(path, framework="pt"):  # never copy a file into an output that safetensors refuses
                return layout
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing, but {INDEX_FILE} names it") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        except CorruptFileError as error:
            raise CheckpointError(str(error)) from error
        except SafetensorError as error:
            raise CheckpointError(f"{path}: safetensors cannot read it: {error}") from error

    def _check_index(self) -> None:
        for key, name in (self.index or {"weight_map": {}})["weight_map"].items():
            if key not in self._files or self._files[key].path.name != name:
                raise CheckpointError(f"{self.directory / name}: {key} is not in it, but {INDEX_FILE} says so")

    def keys(self) -> list[str]:
        """All tensor names."""
        return list(self._files)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def file(self, key: str) -> WeightFile:
        """Where a tensor lies.

        Raises:
            CheckpointError: no such tensor; the message names the nearest ones.
        """
        if key not in self._files:
            near = difflib.get_close_matches(key, self._files, n=3)
            raise CheckpointError(f"{self.directory}: no tensor {key!r}" + (f"; nearest are {near}" if near else ""))
        return self._files[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.file(key).entry.shape

    def tensor(self, key: str) -> Tensor:
        """Read a tensor, in the dtype of the file."""
        file = self.file(key)
        if file.entry.dtype not in DTYPES:
            raise CheckpointError(f"{file.path}: {key}: dtype {file.entry.dtype} cannot be read")
        return file.read()

    def similar(self, name: str) -> list[str]:
        """The tensors whose names differ from this one by a prefix only.

        The model that was adapted may carry a prefix that the checkpoint lacks, or the other way round
        (``bert.encoder...`` and ``encoder...``).
        """
        return [key for key in self._files if key.endswith(f".{name}")] or self._unprefixed(name)

    def _unprefixed(self, name: str) -> list[str]:
        parts = name.split(".")
        shorter = (".".join(parts[cut:]) for cut in range(1, len(parts) - 1))
        return [key for key in shorter if key in self._files][:1]

    def config(self) -> Mapping[str, Any]:
        """config.json, or nothing if there is none.

        Raises:
            CheckpointError: the file is not a JSON object, or a field that doran reads has another type.
        """
        path = self.directory / _CONFIG
        with named_errors(path, CheckpointError):
            try:
                config = read_json(path)
            except FileNotFoundError:
                return {}
            except CorruptFileError as error:
                raise CheckpointError(str(error)) from error
        names = config.get("architectures")
        if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
            raise CheckpointError(f"{path}: architectures={names!r}, expected a list of names or null")
        return config
