"""Recognises and reads adapters of stacked expert weights, which only merged mode serves. No vLLM here."""

from __future__ import annotations

from pathlib import Path

from doran_core.adapter import FoldedAdapter, TrainableAdapter, read_adapter
from doran_core.adapter.folded import fold_layer
from doran_core.adapter.keys import split_keys
from doran_core.adapter.schema import TENSOR_FILE
from doran_core.checkpoint.binding import BoundModule, bind
from doran_core.errors import CheckpointError, DoranError, TargetError
from doran_core.files.layout import read_layout
from doran_serve.base import BaseModel

__all__ = ["read_expert_adapter", "refuse_in_mixed_mode", "stacks_of"]


def stacks_of(folder: Path) -> list[str]:
    """Names of the stacked parameters that a trainable adapter adapts; none for files that its reader refuses."""
    path = folder / TENSOR_FILE
    try:
        shapes = {key: entry.shape for key, entry in read_layout(path).entries.items()}
        modules, _ = split_keys(path, shapes, "trainable")
    except (OSError, DoranError):
        return []
    return [name for name, parts in modules.items() if len(parts.get("magnitude", ())) == 2]


def refuse_in_mixed_mode(folder: Path, stacks: list[str]) -> None:
    """Raise TargetError, naming a stack and the alternatives."""
    raise TargetError(
        f"{folder}: adapts the stacked expert weights {stacks[0]}; in mixed mode vLLM's LoRA for experts has no scale "
        "per expert and output row, which DoRAN needs; serve it in merged mode, or serve the checkpoint that `doran "
        "merge` writes"
    )


def read_expert_adapter(folder: Path, base: BaseModel) -> tuple[FoldedAdapter, dict[str, list[BoundModule]]]:
    """The adapter's ordinary layers, folded, and the matrices of each stack, bound to the base's files.

    Raises:
        AdapterFormatError: the adapter is not valid.
        BaseMismatchError: it was made for other base weights.
        CheckpointError: there are no local files of plain base weights, or they lack an adapted module.
    """
    adapter = read_adapter(folder)
    assert isinstance(adapter, TrainableAdapter)
    if base.checkpoint is None:
        raise CheckpointError(
            f"{folder}: an adapter of stacked expert weights needs the base's own files, as plain weights in a local "
            "directory"
        )
    bound = bind(adapter, base.checkpoint, folder)
    stacks: dict[str, list[BoundModule]] = {}
    modules = {}
    for module in bound.modules:
        if module.factors.stack is not None:
            stacks.setdefault(module.factors.stack, []).append(module)
        else:
            modules[module.name] = fold_layer(module.factors, module.weight_rows(), module.kind, module.kernel)
    ordinary = FoldedAdapter(
        modules=modules, extra=bound.adapter_extra, ties=bound.names.ties, stored_names=adapter.stored_names
    )
    return ordinary, stacks
