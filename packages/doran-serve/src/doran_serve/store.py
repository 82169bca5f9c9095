"""Adapter directories as a server needs them: any form read, checked against the base, compiled once. No vLLM here.

Trainable adapters and PEFT's DoRA adapters need the base weights to become servable; the result is kept in a cache
directory as a compiled adapter, named by the content of the adapter and the identity of the base.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from doran_core.adapter import (
    AnyAdapter,
    CompiledAdapter,
    PeftAdapter,
    read_adapter,
    read_compiled,
    write_compiled,
)
from doran_core.adapter.schema import ADAPTER_FILES, CONFIG_FILE, SCALE_FILE, TENSOR_FILE
from doran_core.convert import compile_adapter, from_peft
from doran_core.errors import AdapterFormatError, CheckpointError, RankError, TargetError, UnexpectedKeyError
from doran_serve.base import BaseModel, local_directory
from doran_serve.records import AdapterForm, AdapterInfo, ServedAdapter, ServedModule
from doran_serve.vllm_symbols import lookup

__all__ = [
    "AdapterStore",
    "adapter_version",
    "default_cache_directory",
]

_PACKED = (
    frozenset({"qkv_proj", "q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_up_proj", "gate_proj", "up_proj"}),
)
"""Layers of vLLM with the projections that it packs into them: one of the names makes all of them adaptable."""


def default_cache_directory() -> Path:
    """``$DORAN_CACHE_DIR``, or ``doran`` in the user's cache directory."""
    if configured := os.environ.get("DORAN_CACHE_DIR"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "doran"


class AdapterStore:
    """Reads and checks adapters for one base model.

    Args:
        base: directory of the base checkpoint, or None if it is not at hand.
        max_rank: refuse ranks above it (vLLM's ``max_lora_rank``); None for no limit.
        targets: refuse modules of other names (vLLM's ``lora_target_modules``); None for no limit.
        cache_directory: where compiled adapters are kept.
    """

    def __init__(
        self,
        base: str | Path | None,
        *,
        max_rank: int | None = None,
        targets: Collection[str] | None = None,
        cache_directory: Path | None = None,
    ) -> None:
        self.base = BaseModel(None if base is None else Path(base))
        self.max_rank = max_rank
        self.targets = None if targets is None else frozenset(targets)
        self.cache_directory = cache_directory or default_cache_directory()
        self._checked: dict[Path, tuple[_Signature, AdapterInfo]] = {}
        self._lock = threading.Lock()

    @classmethod
    def for_engine(cls, vllm_config: Any) -> AdapterStore:
        """The store of a vLLM engine; one per base model and limits in a process."""
        model, lora = vllm_config.model_config, vllm_config.lora_config
        if lora is None:
            return _shared_store(model.model, model.revision, None, None)
        targets = None if lora.target_modules is None else frozenset(lora.target_modules)
        return _shared_store(model.model, model.revision, lora.max_lora_rank, targets)

    @staticmethod
    def require_directory(path: str | Path, name: str) -> None:
        """Raise vLLM's LoRAAdapterNotFoundError if there is no such directory (its server answers 404)."""
        if not Path(path).is_dir():
            raise lookup("LoRAAdapterNotFoundError")(name, str(path))

    def check(self, path: str | Path) -> AdapterInfo:
        """Read and check an adapter; immediate if its files are those of the last successful check.

        Raises:
            AdapterFormatError: what is wrong with its files, by file and key.
            BaseMismatchError: it was made for other base weights.
            CheckpointError: it adapts what the base does not have, or needs base weights that are not at hand.
        """
        folder = Path(path)
        signature = _signature(folder)
        with self._lock:
            known = self._checked.get(folder)
            if known is None or known[0] != signature:
                info = replace(self._info(folder), version=_short(signature))
                known = self._checked[folder] = (signature, info)
        return known[1]

    def load(self, path: str | Path) -> ServedAdapter | None:
        """The adapter's tensors, checked against its own files; compiled on the way if it has to be.

        Returns:
            None for a LoRA of a kind that doran does not read (experts, embeddings, a full head) but vLLM may.

        Raises:
            as `check`, except for what `check` alone compares with the base.
        """
        return self._load(Path(path))[0]

    def _load(self, folder: Path) -> tuple[ServedAdapter | None, AnyAdapter | None]:
        """The adapter, and the record that it was made of; None both if only vLLM may be able to read it."""
        form = _form(folder)
        if form == "lora":
            served, record = self._load_lora(folder)
        else:
            record = read_compiled(folder) if form == "compiled" else self._compiled(folder, form)
            served = _served(folder, form, record)
        if served is not None:
            self._check_rank(served)
            self._check_targets(served)
        return served, record

    def _info(self, folder: Path) -> AdapterInfo:
        served, record = self._load(folder)
        if served is None or record is None:
            return AdapterInfo(folder, "lora", None, 0, 0)
        if served.form in ("lora", "compiled"):  # the converters have held the other forms against the base
            self.base.check(folder, record)
        values = sum(
            module.A.numel() + module.B.numel() + (0 if module.scale is None else module.scale.numel())
            for module in served.modules.values()
        )
        targets = frozenset(name.rpartition(".")[2] for name in served.modules)
        return AdapterInfo(folder, served.form, served.rank, len(served.modules), values, targets)

    def _check_rank(self, adapter: ServedAdapter) -> None:
        if self.max_rank is not None and adapter.rank > self.max_rank:
            raise RankError(
                f"{adapter.path}: rank {adapter.rank}, but the engine was started with max_lora_rank={self.max_rank}"
            )

    def _check_targets(self, adapter: ServedAdapter) -> None:
        for name in adapter.modules if self.targets is not None else ():
            last = name.rpartition(".")[2]
            beside = next((names for names in _PACKED if last in names), frozenset())
            if self.targets is not None and not self.targets & {name, last, *beside}:
                raise TargetError(
                    f"{adapter.path}: adapts {name}, but the engine was started with lora_target_modules="
                    f"{','.join(sorted(self.targets))}"
                )

    def _load_lora(self, folder: Path) -> tuple[ServedAdapter | None, AnyAdapter | None]:
        try:
            adapter = read_adapter(folder)
        except AdapterFormatError as error:
            if type(error) in (AdapterFormatError, UnexpectedKeyError):  # sound files, but not a plain LoRA
                return None, None
            raise
        if not isinstance(adapter, PeftAdapter) or adapter.extra:
            return None, None
        parts = adapter.modules.values()
        if any(part.kind is not None or ".experts" in part.name for part in parts):
            return None, None
        modules = {part.name: ServedModule(part.name, part.A, part.B.float() * part.scaling, None) for part in parts}
        return ServedAdapter(folder, "lora", modules), adapter

    def _compiled(self, folder: Path, form: AdapterForm) -> CompiledAdapter:
        """From the cache, or made of the base weights and cached."""
        if self.base.directory is None:
            read_adapter(folder)  # what is wrong with the adapter itself comes first
            raise CheckpointError(
                f"{folder}: a {form} adapter needs the base weights to be compiled, but the base model is no local "
                "directory; compile it first with `doran convert --to compiled`"
            )
        if self.base.quantized:
            read_adapter(folder)
            raise CheckpointError(
                f"{folder}: a {form} adapter needs plain base weights to be compiled, but {self.base.directory} is "
                "quantized; compile it against the original checkpoint with `doran convert --to compiled`"
            )
        target = self.cache_directory / "compiled" / _content_key(folder, self.base.identity)
        if (target / SCALE_FILE).exists():
            return read_compiled(target)
        convert = from_peft if form == "dora" else compile_adapter
        adapter = convert(folder, self.base.directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_compiled(adapter, target, overwrite=True)
        return adapter


@functools.cache
def _shared_store(
    model: str, revision: str | None, max_rank: int | None, targets: frozenset[str] | None
) -> AdapterStore:
    return AdapterStore(local_directory(model, revision), max_rank=max_rank, targets=targets)


def _form(folder: Path) -> AdapterForm:
    """The form of an adapter by its configuration; the readers say what is wrong with one that is none."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if (folder / SCALE_FILE).exists():
        return "compiled"
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        return "trainable"
    return "dora" if config.get("use_dora") else "lora"


def _served(folder: Path, form: AdapterForm, adapter: CompiledAdapter) -> ServedAdapter:
    """Refuse what one batch cannot hold: replaced base parameters, and layers that are not linear."""
    if adapter.extra:
        raise UnexpectedKeyError(
            f"{folder}: replaces base parameters in full ({', '.join(sorted(adapter.extra))}), which requests of one "
            "batch share; merge it with `doran merge` and serve the merged checkpoint"
        )
    for module in adapter.modules.values():
        if module.kind not in ("linear", "conv1d"):
            raise AdapterFormatError(
                f"{folder}: {module.name}: adapts a layer of kind {module.kind!r}; mixed serving scales linear layers "
                "only; merge it with `doran merge` and serve the merged checkpoint"
            )
    modules = {name: ServedModule(name, module.A, module.B, module.scale) for name, module in adapter.modules.items()}
    return ServedAdapter(folder, form, modules)


def adapter_version(path: str | Path) -> str:
    """A short name for the files of an adapter as they are now; another one once any of them is replaced."""
    return _short(_signature(Path(path)))


def _short(signature: _Signature) -> str:
    return hashlib.sha256(repr(signature).encode()).hexdigest()[:16]


_Signature = tuple[tuple[str, int, int, int], ...]


def _signature(folder: Path) -> _Signature:
    """Name, size, time and inode of each adapter file that exists."""
    found = []
    for name in ADAPTER_FILES:
        try:
            status = os.stat(f"{folder}/{name}")  # noqa: PTH116 - every request comes by, and Paths cost more
        except OSError:
            continue
        found.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)


def _content_key(folder: Path, base_identity: str) -> str:
    digest = hashlib.sha256(base_identity.encode())
    for name in (CONFIG_FILE, TENSOR_FILE):
        try:
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            digest.update(b"missing")  # the reader names it
    return digest.hexdigest()
