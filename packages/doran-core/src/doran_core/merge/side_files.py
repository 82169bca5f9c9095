"""The files beside the weights: config.json adjusted to the merge, the index, tokenizer and other small files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from doran_core.checkpoint.binding import BoundAdapter
from doran_core.checkpoint.checkpoint import INDEX_FILE, Checkpoint
from doran_core.errors import CheckpointError
from doran_core.files.jsonfile import JSON_LIMIT, parse_object, write_json
from doran_core.files.opening import named_errors, read_file
from doran_core.merge.plan import MergePlan
from doran_core.merge.staging import Staging

__all__ = ["write_side_files"]

_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".index.json",
)
_ADAPTER_NAMES = re.compile(r"adapter_.*|doran_scale.*")
_LARGEST = 2**28
"""Most bytes of a tokenizer or similar file. The largest vocabularies have some ten million."""
_HEADS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


def write_side_files(
    checkpoint: Checkpoint,
    plan: MergePlan,
    adapters: Sequence[BoundAdapter],
    dtype: torch.dtype | None,
    staging: Staging,
) -> None:
    """Write all that is not a shard of weights."""
    for relative in _small_files(checkpoint.directory):
        source = checkpoint.directory / relative
        if source.stat().st_size > _LARGEST:
            raise CheckpointError(f"{source}: too large for a file beside the weights ({source.stat().st_size} bytes)")
        shutil.copyfile(source, staging.part(str(relative)))
        staging.complete(str(relative))
    with named_errors(checkpoint.directory / "config.json", CheckpointError):
        config = _merged_config(checkpoint.config(), plan, adapters, dtype)
    if config:
        write_json(staging.part("config.json"), config)
        staging.complete("config.json")
    if checkpoint.index is not None:
        _write_index(checkpoint, plan, staging.part(INDEX_FILE))
        staging.complete(INDEX_FILE)


def _small_files(directory: Path) -> list[Path]:
    found = [path.relative_to(directory) for path in sorted(directory.iterdir()) if path.is_file()]
    for folder in _module_folders(directory):
        found += [path.relative_to(directory) for path in sorted((directory / folder).rglob("*")) if path.is_file()]
    return [path for path in found if not _is_left_behind(path)]


def _is_left_behind(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.name.endswith(_WEIGHT_SUFFIXES) or bool(_ADAPTER_NAMES.fullmatch(path.name))


def _module_folders(directory: Path) -> list[str]:
    """Folders of a sentence-transformers model beside its transformer, as listed in its modules.json."""
    path = directory / "modules.json"
    with named_errors(path, CheckpointError):
        try:
            modules = parse_object(read_file(path, JSON_LIMIT))
        except FileNotFoundError:
            return []
        folders = [str(module["path"]) for module in modules]
    return [folder for folder in folders if folder and _is_inside(folder) and (directory / folder).is_dir()]


def _is_inside(folder: str) -> bool:
    return not Path(folder).is_absolute() and ".." not in Path(folder).parts


def _merged_config(
    base: Mapping[str, Any], plan: MergePlan, adapters: Sequence[BoundAdapter], dtype: torch.dtype | None
) -> dict[str, Any]:
    config = dict(base)
    if dtype is not None and config:
        _set_dtype(config, str(dtype).removeprefix("torch."), top=True)
    if plan.untied:
        config["tie_word_embeddings"] = False
    for bound in adapters:
        _set_head(config, bound)
    return config


def _set_dtype(config: dict[str, Any], name: str, *, top: bool) -> None:
    """transformers 5 says "dtype", earlier ones "torch_dtype"; nested configs (text, vision) have their own."""
    present = [field for field in ("dtype", "torch_dtype") if field in config]
    for field in present or (["dtype"] if top else []):
        config[field] = name
    for part, value in config.items():
        if part.endswith("_config") and isinstance(value, dict):
            config[part] = dict(value)
            _set_dtype(config[part], name, top=False)


def _set_head(config: dict[str, Any], bound: BoundAdapter) -> None:
    """An adapter with a classifier that the base lacks turns the checkpoint into a classifier."""
    head = _HEADS.get(bound.adapter.task_type or "")
    labels = [t.shape[0] for name, t in bound.extra.items() if name.endswith(".weight") and t.dim() == 2]
    if head is None or not labels or not config.get("architectures"):
        return
    if any(name.endswith(head) for name in config["architectures"]):
        return
    config["architectures"] = [re.sub(r"(For\w+|Model|LMHeadModel)$", "", config["architectures"][0]) + head]
    if len(config.get("id2label") or {}) != labels[-1]:
        config["id2label"] = {str(index): f"LABEL_{index}" for index in range(labels[-1])}
        config["label2id"] = {f"LABEL_{index}": index for index in range(labels[-1])}


def _write_index(checkpoint: Checkpoint, plan: MergePlan, path: Path) -> None:
    if not plan.keys_changed:
        shutil.copyfile(checkpoint.directory / INDEX_FILE, path)
        return
    assert checkpoint.index is not None
    metadata = checkpoint.index.get("metadata")
    total = sum(entry.nbytes for shard in plan.shards for entry, _ in shard.tensors)
    places = {entry.key: shard.name for shard in plan.shards for entry, _ in shard.tensors}
    index = dict(checkpoint.index)
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    index["weight_map"] = dict(sorted(places.items()))
    write_json(path, index)
