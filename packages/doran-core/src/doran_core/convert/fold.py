"""Folds an adapter of any form, with the base weights streamed from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from doran_core.adapter import AnyAdapter, FoldedAdapter, PeftAdapter, TrainableAdapter, read_adapter
from doran_core.adapter.folded import fold_layer
from doran_core.checkpoint.binding import BoundAdapter, BoundModule, bind, checkpoint_fingerprint
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.errors import AdapterFormatError
from doran_core.files import StrPath
from doran_core.method.factors import FactorBuilder

__all__ = ["fold_adapter", "from_peft"]

Progress = Callable[[int, int], None]


def fold_adapter(
    adapter_dir: StrPath,
    base_dir: StrPath,
    *,
    allow_base_mismatch: bool = False,
    factor_builder: FactorBuilder | None = None,
    progress: Progress | None = None,
) -> FoldedAdapter:
    """Fold an adapter directory of any form against its base checkpoint.

    A folded adapter is returned unchanged after a check of its base. The result computes the same function:
    ``c = m / (||W0 + g B A|| + tau)`` in float64, rounded to float32 once.

    Args:
        adapter_dir: trainable, folded, or a PEFT LoRA or DoRA adapter.
        base_dir: the checkpoint that it adapts.
        allow_base_mismatch: accept base weights with another fingerprint.
        factor_builder: the one given to :func:`doran_core.adapt`, for an adapter that was trained with one.
        progress: called with (modules done, modules in all).

    Raises:
        AdapterFormatError: the adapter is not valid.
        CheckpointError: the base cannot be read, changes meanwhile, or does not have the adapter's modules.
        BaseMismatchError: the base is another one.
    """
    adapter = read_adapter(adapter_dir)
    checkpoint = Checkpoint(base_dir)
    bound = bind(
        adapter,
        checkpoint,
        adapter_dir,
        allow_base_mismatch=allow_base_mismatch,
        factor_builder=factor_builder,
    )
    if isinstance(adapter, FoldedAdapter):
        return adapter
    if stack := next((module.factors.stack for module in bound.modules if module.factors.stack), None):
        raise AdapterFormatError(
            f"{adapter_dir}: adapts the stacked expert weights {stack}, which the folded form cannot hold: it is a "
            "PEFT DoRA adapter, and PEFT has none for experts; keep the trainable form, or merge it (doran merge)"
        )
    modules = {}
    for done, module in enumerate(bound.modules, 1):
        modules[module.name] = fold_layer(module.factors, module.weight_rows(), module.kind, module.kernel)
        if progress is not None:
            progress(done, len(bound.modules))
    fingerprint = bound.fingerprint or _fingerprint(bound.modules)
    checkpoint.require_unchanged()
    return FoldedAdapter(
        modules=modules,
        extra=bound.adapter_extra,
        base_fingerprint=fingerprint,
        base_model=adapter.base_model,
        task_type=adapter.task_type,
        modules_to_save=_modules_to_save(adapter),
        ties=bound.names.ties,
        stored_names=_stored_names(bound),
    )


def from_peft(peft_dir: StrPath, base_dir: StrPath, *, progress: Progress | None = None) -> FoldedAdapter:
    """Fold a PEFT LoRA or DoRA adapter; rank_pattern, alpha_pattern and rslora go into B.

    Raises:
        AdapterFormatError: not a PEFT LoRA or DoRA adapter, or one with an option that cannot be represented.
        CheckpointError: the base cannot be read, or does not have the adapter's modules.
    """
    adapter = read_adapter(peft_dir)
    if not isinstance(adapter, PeftAdapter):
        raise AdapterFormatError(f"{peft_dir}: is a DoRAN adapter, expected a PEFT LoRA or DoRA adapter")
    return fold_adapter(peft_dir, base_dir, progress=progress)


def _stored_names(bound: BoundAdapter) -> dict[str, str]:
    """Names in a checkpoint of the parameters that have other names there."""
    parameters = [*(m.parameter for m in bound.modules), *bound.adapter_extra, *(bound.names.ties or {})]
    names = {parameter: bound.names.nominal(parameter) for parameter in parameters}
    return {parameter: name for parameter, name in names.items() if name != parameter}


def _fingerprint(modules: list[BoundModule]) -> str | None:
    """The base's fingerprint; None for float16, which may be a rounded copy."""
    return None if any(m.file.entry.dtype == "F16" for m in modules) else checkpoint_fingerprint(modules)


def _modules_to_save(adapter: AnyAdapter) -> list[str] | None:
    saved = (
        adapter.config.modules_to_save
        if isinstance(adapter, TrainableAdapter)
        else adapter.config.get("modules_to_save")
        if isinstance(adapter, PeftAdapter)
        else adapter.modules_to_save
    )
    return list(saved) if saved else None
