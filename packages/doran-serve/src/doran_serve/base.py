"""The base model's files, to check adapters against: module names, shapes, fingerprint. No vLLM here."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from dataclasses import replace
from pathlib import Path

from doran_core.adapter import FoldedAdapter, PeftAdapter
from doran_core.checkpoint.binding import bind
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.checkpoint.model_names import ModelNames
from doran_core.errors import CheckpointError

__all__ = ["BaseModel", "local_directory"]

_logger = logging.getLogger("vllm.doran_serve")


def local_directory(model: str, revision: str | None = None) -> Path | None:
    """The local directory of `model`: the directory itself, or the snapshot of a hub name; None if there is none."""
    if Path(model).is_dir():
        return Path(model).resolve()
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:  # vLLM brings it; without it only directories can be served
        return None
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


class BaseModel:
    """The base checkpoint, against which adapters are checked.

    Args:
        directory: the checkpoint, or None if there is no local one (then the engine's layers check shapes).
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._fingerprints: set[tuple[str | None, frozenset[str]]] = set()

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The files, or None if they are not a safetensors checkpoint of plain weights (a quantized one is not)."""
        if self.directory is None:
            return None
        try:
            checkpoint = Checkpoint(self.directory)
        except CheckpointError as error:
            _logger.warning("adapters are not checked against the base model's files: %s", error)
            return None
        if self.quantized:
            _logger.warning("%s is quantized: adapters are not checked against its files", self.directory)
            return None
        return checkpoint

    @functools.cached_property
    def quantized(self) -> bool:
        """Whether the configuration says that the weights are quantized."""
        try:
            return self.directory is not None and "quantization_config" in Checkpoint(self.directory).config()
        except CheckpointError:
            return False

    @functools.cached_property
    def identity(self) -> str:
        """A cache key for the current files (path, sizes, times)."""
        digest = hashlib.sha256(str(self.directory).encode())
        for path in sorted(self.directory.glob("*.safetensors")) if self.directory else []:
            status = path.stat()
            digest.update(f"\0{path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def stored_names(self, adapter: FoldedAdapter | PeftAdapter) -> dict[str, str]:
        """The names that an adapter's modules have in the checkpoint, by the adapter's own names.

        If there is no local checkpoint, or the checkpoint lacks a module, the name is the one that the adapter records,
        or the module's own.
        """
        recorded = {} if isinstance(adapter, PeftAdapter) else adapter.stored_names or {}
        keys = {name: recorded.get(f"{name}.weight", f"{name}.weight") for name in adapter.modules}
        if self.checkpoint is not None:
            ties = None if isinstance(adapter, PeftAdapter) else adapter.ties
            model = ModelNames(self.checkpoint, ties, recorded)
            for name in keys:
                with contextlib.suppress(CheckpointError):
                    keys[name], _ = model.locate(f"{name}.weight")
        return {name: key.removesuffix(".weight") for name, key in keys.items()}

    def check(self, where: str | Path, adapter: FoldedAdapter | PeftAdapter) -> None:
        """Refuse an adapter whose modules, shapes or fingerprint are not this base's.

        Args:
            where: the adapter's directory, for the message.
            adapter: of any form but the trainable one.

        Raises:
            CheckpointError: the base has no such module, or one of another shape.
            BaseMismatchError: the adapter was made for other weights; names both fingerprints.
        """
        if self.checkpoint is None:
            return
        if isinstance(adapter, PeftAdapter):
            # PEFT's files record neither stored names nor ties, and versions of transformers name the modules of
            # multimodal models differently. vLLM knows these names; its layers decide.
            if "text_config" not in self.checkpoint.config():
                bind(adapter, self.checkpoint, where)
            return
        known = adapter.base_fingerprint, frozenset(adapter.modules)
        if known in self._fingerprints:  # a policy's next version: do not read all weights again
            adapter = replace(adapter, base_fingerprint=None)
        bind(adapter, self.checkpoint, where)
        self._fingerprints.add(known)
