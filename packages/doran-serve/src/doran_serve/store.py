"""Reads adapter directories for a server: any form, checked against the base, folded once. No vLLM here.

Trainable adapters and PEFT's DoRA adapters need the base weights to become servable; the result is kept in a cache
directory as a folded adapter, named by the content of the adapter and the identity of the base.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from doran_core.adapter import (
    FoldedAdapter,
    PeftAdapter,
    read_adapter,
    read_folded,
    write_folded,
)
from doran_core.adapter.schema import ADAPTER_FILES, CONFIG_FILE, SCALE_FILE
from doran_core.convert import fold_adapter, from_peft
from doran_core.errors import (
    AdapterFormatError,
    CheckpointError,
    DoranError,
    RankError,
    TargetError,
    UnexpectedKeyError,
)
from doran_core.files.jsonfile import read_json
from doran_serve.admission import AdmittedCopies, content_digest, unmarked
from doran_serve.base import BaseModel, local_directory
from doran_serve.expert_adapters import read_expert_adapter, refuse_in_mixed_mode, stacks_of
from doran_serve.layer_rules import LayerRules
from doran_serve.merged.mode import is_merged
from doran_serve.records import AdapterForm, AdapterInfo, ServedAdapter, ServedModule
from doran_serve.vllm_symbols import lookup

__all__ = ["AdapterStore", "check_mergeable", "default_cache_directory"]

_logger = logging.getLogger("vllm.doran_serve")
_Factored = FoldedAdapter | PeftAdapter

_CLASSIFIERS = ("score", "classifier")
"""Heads of cross-encoders that vLLM swaps per request."""
_TRIES = 5
"""Most attempts to read files that change while they are checked."""

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
        base: directory of the base checkpoint; None if there is no local one.
        max_rank: refuse ranks above it (vLLM's ``max_lora_rank``); None for no limit.
        targets: refuse modules of other names (vLLM's ``lora_target_modules``); None for no limit.
        cache_directory: directory of the folded adapters.
        stacks: read adapters of stacked expert weights, too, which only merged mode serves.
    """

    def __init__(
        self,
        base: str | Path | None,
        *,
        max_rank: int | None = None,
        targets: Collection[str] | None = None,
        cache_directory: Path | None = None,
        stacks: bool = False,
    ) -> None:
        self.stacks = stacks
        self.base = BaseModel(None if base is None else Path(base))
        self.max_rank = max_rank
        self.targets = None if targets is None else frozenset(targets)
        self.cache_directory = cache_directory or default_cache_directory()
        self.copies = AdmittedCopies(self.cache_directory / "admitted")
        self._checked: dict[tuple[Path, bool], tuple[_Signature, AdapterInfo]] = {}
        self._locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)

    @classmethod
    def for_engine(cls, vllm_config: Any) -> AdapterStore:
        """The store of a vLLM engine; one per base model and limits in a process."""
        model, lora = vllm_config.model_config, vllm_config.lora_config
        if lora is None:
            return _shared_store(model.model, model.revision, None, None, is_merged(vllm_config))
        targets = None if lora.target_modules is None else frozenset(lora.target_modules)
        return _shared_store(model.model, model.revision, lora.max_lora_rank, targets, False)

    @staticmethod
    def require_directory(path: str | Path, name: str) -> None:
        """Raise vLLM's LoRAAdapterNotFoundError if there is no such directory (its server answers 404)."""
        if not Path(path).is_dir():
            raise lookup("LoRAAdapterNotFoundError")(name, str(path))

    def check(self, path: str | Path) -> AdapterInfo:
        """Read and check an adapter; returns at once if its files have not changed since the last successful check.

        Raises:
            AdapterFormatError: a fault of its files; the message names file and key.
            BaseMismatchError: the adapter was made for other base weights.
            CheckpointError: the base lacks an adapted module, or the adapter needs base weights and there are none.
        """
        return self._current(Path(path), None)

    def admit(self, path: str | Path) -> AdapterInfo:
        """As `check`, with a private copy of the files; `AdapterInfo.version` is their digest.

        Raises:
            as `check`.
        """
        for _ in range(_TRIES):
            info = self._current(Path(path), self.copies.keep)
            # The copy may have been removed to make room, or there was no room.
            if self.copies.touch(info.version) or self.copies.keep(Path(path)) == info.version:
                return info
        raise _keeps_changing(Path(path))

    def _current(self, folder: Path, keep: Callable[[Path], str] | None) -> AdapterInfo:
        """The record of the current files; reads them if they have changed since the last check."""
        key = (folder, keep is not None)
        known = self._checked.get(key)
        if known is not None and known[0] == _signature(folder):
            return known[1]
        with self._locks[folder]:
            for attempt in range(_TRIES):
                signature = _signature(folder)
                known = self._checked.get(key)
                if known is not None and known[0] == signature:
                    return known[1]
                try:
                    info = self._info(folder)
                    info = info if keep is None else replace(info, version=keep(folder))
                except DoranError:
                    if attempt + 1 < _TRIES and _signature(folder) != signature:
                        continue
                    raise
                if _signature(folder) == signature:
                    self._checked[key] = (signature, info)
                    return info
        raise _keeps_changing(folder)

    def load(self, path: str | Path) -> ServedAdapter | None:
        """The adapter's tensors, checked; a trainable or DoRA adapter is folded first.

        Returns:
            None for a LoRA that doran cannot read but vLLM may (experts, embeddings, a full head).

        Raises:
            as `check`, except for what `check` alone compares with the base.
        """
        return self._load(Path(path))[0]

    def load_admitted(self, path: str) -> tuple[ServedAdapter | None, Path]:
        """The adapter behind a path that `admission.marked` made, and the directory that it was read from.

        Raises:
            as `load`; also AdapterFormatError if that version is gone.
        """
        source, digest = unmarked(path)
        folder = Path(source) if digest is None else self.copies.find(Path(source), digest)
        adapter = self.load(folder)
        return (None if adapter is None else replace(adapter, path=Path(source))), folder

    def _load(self, folder: Path) -> tuple[ServedAdapter | None, _Factored | None]:
        """The adapter, None if only vLLM may serve it; and the record of its files, None if only vLLM may read them."""
        form = _form(folder)
        served: ServedAdapter | None
        record: _Factored | None
        if form == "lora":
            served, record = self._load_lora(folder)
        elif form == "trainable" and (names := stacks_of(folder)):
            if not self.stacks:
                refuse_in_mixed_mode(folder, names)
            record, stacks = read_expert_adapter(folder, self.base)
            served = replace(_served(folder, form, record, self.base.stored_names(record)), stacks=stacks)
        else:
            record = read_folded(folder) if form == "folded" else self._folded(folder, form)
            served = _served(folder, form, record, self.base.stored_names(record))
        if record is not None and record.modules:
            self._check_rank(folder, record)
        if served is not None:
            self._check_targets(served)
        return served, record

    def _info(self, folder: Path) -> AdapterInfo:
        served, record = self._load(folder)
        if record is None:
            return AdapterInfo(folder, "lora", None, 0, 0)
        form = "lora" if served is None else served.form
        others = self._check_layers(folder, form, record)
        if form in ("lora", "folded"):  # the converters have checked the other forms against the base
            self.base.check(folder, record)
        layers: Collection[Any] = (record if served is None else served).modules.values()
        stacks = {} if served is None else served.stacks
        modules = [*layers]
        modules += [matrix.factors for parts in stacks.values() for matrix in parts]
        values = sum(
            module.A.numel() + module.B.numel() + (0 if getattr(module, "scale", None) is None else module.B.shape[0])
            for module in modules
        )
        rank = max(module.A.shape[0] for module in modules)
        targets = frozenset() if served is None else frozenset(name.rpartition(".")[2] for name in served.modules)
        return AdapterInfo(folder, form, rank, len(layers) + len(stacks), values, targets, others, tuple(stacks))

    def _check_layers(self, folder: Path, form: AdapterForm, record: _Factored) -> tuple[str, ...]:
        """Refuse layers that vLLM does not adapt in this form; the names of those that are not linear."""
        rules, stored, others = LayerRules(self.base.checkpoint), self.base.stored_names(record), []
        for module in record.modules.values():
            served_as = rules.served_as(stored[module.name], module.B.shape[0], module.kind)
            stock_lora = served_as in ("embedding", "output head") and form == "lora"
            if served_as == "another tower" or (stock_lora and not rules.stock_adapts(module.name)):
                raise TargetError(
                    f"{folder}: {module.name}: vLLM serves this layer as {served_as}, which it does not adapt; leave "
                    "the layer out of target_modules, or merge the adapter with `doran merge` and serve the merged "
                    "checkpoint"
                )
            if served_as != "linear":
                others.append(module.name)
                if form != "lora":
                    raise TargetError(
                        f"{folder}: {module.name}: vLLM serves this layer as {served_as}, which cannot have the "
                        f"output scale of a {form} adapter; leave the layer out of target_modules, or merge the "
                        "adapter with `doran merge` and serve the merged checkpoint"
                    )
        return tuple(others)

    def _check_rank(self, folder: Path, record: _Factored) -> None:
        rank = max(module.A.shape[0] for module in record.modules.values())
        if self.max_rank is not None and rank > self.max_rank:
            raise RankError(f"{folder}: rank {rank}, but the engine was started with max_lora_rank={self.max_rank}")

    def _check_targets(self, adapter: ServedAdapter) -> None:
        for name in adapter.modules if self.targets is not None else ():
            last = name.rpartition(".")[2]
            beside = next((names for names in _PACKED if last in names), frozenset())
            if self.targets is not None and not self.targets & {name, last, *beside}:
                raise TargetError(
                    f"{adapter.path}: adapts {name}, but the engine was started with lora_target_modules="
                    f"{','.join(sorted(self.targets))}"
                )

    def _load_lora(self, folder: Path) -> tuple[ServedAdapter | None, PeftAdapter | None]:
        try:
            adapter = read_adapter(folder)
        except AdapterFormatError as error:
            if type(error) in (AdapterFormatError, UnexpectedKeyError):  # sound files, but not a plain LoRA
                return None, None
            raise
        if not isinstance(adapter, PeftAdapter):
            return None, None
        if adapter.extra:
            if not all(name.rpartition(".")[0].rpartition(".")[2] in _CLASSIFIERS for name in adapter.extra):
                _refuse_replaced(folder, adapter.extra)
            return None, adapter
        parts = adapter.modules.values()
        if any(part.kind is not None or ".experts" in part.name for part in parts):
            return None, adapter
        stored = self.base.stored_names(adapter)
        modules = {
            part.name: ServedModule(part.name, part.A, part.B.float() * part.scaling, None, stored[part.name])
            for part in parts
        }
        return ServedAdapter(folder, "lora", modules), adapter

    def _folded(self, folder: Path, form: AdapterForm) -> FoldedAdapter:
        """The folded adapter from the cache, or folded with the base weights and cached."""
        if self.base.directory is None:
            read_adapter(folder)  # report the adapter's own faults first
            raise CheckpointError(
                f"{folder}: a {form} adapter needs the base weights to be folded, but the base model is no local "
                "directory; fold it first with `doran convert --to folded`"
            )
        if self.base.quantized:
            read_adapter(folder)
            raise CheckpointError(
                f"{folder}: a {form} adapter needs plain base weights to be folded, but {self.base.directory} is "
                "quantized; fold it against the original checkpoint with `doran convert --to folded`"
            )
        target = self.cache_directory / "folded" / _cache_key(folder, self.base.identity)
        if (target / SCALE_FILE).exists():
            try:
                return read_folded(target)
            except DoranError as error:
                _logger.warning("the folded adapter in the cache is damaged and is made again: %s", error)
        convert = from_peft if form == "dora" else fold_adapter
        adapter = convert(folder, self.base.directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_folded(adapter, target, overwrite=True)
        return adapter


@functools.cache
def _shared_store(
    model: str, revision: str | None, max_rank: int | None, targets: frozenset[str] | None, stacks: bool
) -> AdapterStore:
    return AdapterStore(local_directory(model, revision), max_rank=max_rank, targets=targets, stacks=stacks)


def _form(folder: Path) -> AdapterForm:
    """The form of an adapter by its configuration. The readers report invalid adapters."""
    try:
        config = read_json(folder / CONFIG_FILE)
    except (OSError, DoranError):
        config = {}
    if (folder / SCALE_FILE).exists():
        return "folded"
    if config.get("peft_type") != "LORA":
        return "trainable"
    return "dora" if config.get("use_dora") else "lora"


def _served(folder: Path, form: AdapterForm, adapter: FoldedAdapter, stored: Mapping[str, str]) -> ServedAdapter:
    """Refuse adapters that cannot share a batch: they replace base parameters, or adapt layers that are not linear."""
    if adapter.extra:
        _refuse_replaced(folder, adapter.extra)
    for module in adapter.modules.values():
        if module.kind not in ("linear", "conv1d"):
            raise AdapterFormatError(
                f"{folder}: {module.name}: adapts a layer of kind {module.kind!r}; mixed serving scales linear layers "
                "only; merge it with `doran merge` and serve the merged checkpoint"
            )
    modules = {
        name: ServedModule(name, module.A, module.B, module.scale, stored[name])
        for name, module in adapter.modules.items()
    }
    return ServedAdapter(folder, form, modules)


def _refuse_replaced(folder: Path, names: Collection[str]) -> NoReturn:
    raise UnexpectedKeyError(
        f"{folder}: replaces base parameters in full ({', '.join(sorted(names))}), which requests of one batch share; "
        "merge it with `doran merge` and serve the merged checkpoint"
    )


def check_mergeable(info: AdapterInfo) -> None:
    """Raise TargetError if the adapter changes more than linear layers, which merged mode cannot swap."""
    if info.rank is None or info.others:
        layers = f": {', '.join(info.others[:3])}" if info.others else ""
        raise TargetError(
            f"{info.path}: adapts more than linear layers{layers}; merged mode cannot swap them; serve it in mixed "
            "mode, or the checkpoint that `doran merge` makes"
        )


def _keeps_changing(folder: Path) -> AdapterFormatError:
    return AdapterFormatError(f"{folder}: its files changed each of the {_TRIES} times that they were read")


_Signature = tuple[tuple[str, int, int, int], ...]


def _signature(folder: Path) -> _Signature:
    """Name, size, time and inode of each adapter file that exists."""
    found = []
    for name in ADAPTER_FILES:
        try:
            status = os.stat(f"{folder}/{name}")  # noqa: PTH116 - every request calls this, and Path is slower
        except OSError:
            continue
        found.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)


def _cache_key(folder: Path, base_identity: str) -> str:
    return hashlib.sha256(f"{base_identity}\0{content_digest(folder)}".encode()).hexdigest()
