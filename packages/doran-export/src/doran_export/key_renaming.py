"""Checkpoints whose tensors have older names than the modules that transformers makes of them.

transformers renames on loading (a ViT's ``encoder.layer.0.attention.attention.query`` is its module
``layers.0.attention.q_proj``) and saves under the old names again. An adapter goes by modules, the merge by tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from doran_core.adapter import read_adapter
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.errors import CheckpointError
from doran_export.files import copy_side_files
from doran_export.loading import Source, load_weights

__all__ = ["under_module_names"]


def under_module_names(source: Source, adapters: Iterable[str | Path], scratch: Path) -> Path:
    """The base that the adapters can be bound to: its own directory, or a copy under the names of the modules.

    Args:
        source: the base.
        adapters: adapter directories.
        scratch: where a copy goes, if one is needed; must not exist.

    Raises:
        AdapterFormatError: an adapter is not valid.
        CheckpointError: the base cannot be read.
    """
    checkpoint = Checkpoint(source.path)
    names = {name for adapter in adapters for name in read_adapter(adapter).modules}
    lost = {name for name in names if not _has(checkpoint, name)}
    if not lost:
        return source.path
    model, missing = load_weights(source, "auto")
    if not lost <= {name for name, _ in model.named_modules()}:
        return source.path  # whoever binds the adapter says what is missing, and what is near it
    stored = {key: tensor for key, tensor in model.state_dict().items() if key not in missing}
    model.save_pretrained(scratch, state_dict=stored, save_original_format=False)
    copy_side_files(source.path, scratch)
    return scratch


def _has(checkpoint: Checkpoint, module: str) -> bool:
    try:
        checkpoint.weight_key(module)
    except CheckpointError:
        return False
    return True
