"""Tied weights of a model in memory, such as an embedding and the output layer, and transformers' flag for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from doran_core.support.torch_internals import COMPILED_PART, FSDP1_PART

__all__ = ["FLAG_IN_FORWARD", "base_parameter", "tied_parameters"]

FLAG_IN_FORWARD = frozenset(
    ("longt5", "mt5", "pop2piano", "switch_transformers", "t5", "t5gemma", "t5gemma_module", "udop", "umt5")
)
"""transformers' model types whose outputs depend on ``tie_word_embeddings``: a merge must not change the flag there,
even if it unties weights."""

_NOT_THE_BASE = ("doran_adapter", "modules_to_save")
_WRAPPERS = ("base_layer", "original_module", COMPILED_PART, FSDP1_PART)


def base_parameter(name: str) -> str | None:
    """A parameter's name in the base model, without the parts that adapters, PEFT and torch.compile add.

    Args:
        name: in the adapted model.

    Returns:
        None for a parameter that the base model does not have.
    """
    parts = name.split(".")
    if any(part in _NOT_THE_BASE for part in parts):
        return None
    return ".".join(part for part in parts if part not in _WRAPPERS)


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Each tied parameter and its source, by the base model's names.

    The model's declaration (transformers' ``all_tied_weights_keys``) counts even while a merge has separated the ends.

    Args:
        model: adapted or not.
    """
    declared = dict(_declared(model))
    first: dict[int, str] = {}
    ties = dict(declared)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        base = base_parameter(name)
        if base is None:
            continue
        source = first.setdefault(id(parameter), base)
        source = declared.get(source, source)
        if base not in declared and base != source:
            ties[base] = source
    return ties


def _declared(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The declared ties of the outermost models that declare any."""
    done: list[str] = []
    for name, module in model.named_modules():
        own: Mapping[str, str] | None = getattr(module, "all_tied_weights_keys", None)
        if own is None or any(name == outer or name.startswith(outer) for outer in done):
            continue
        prefix = f"{name}." if name else ""
        done.append(prefix)
        for tied, source in own.items():
            ends = base_parameter(f"{prefix}{tied}"), base_parameter(f"{prefix}{source}")
            if ends[0] is not None and ends[1] is not None:
                yield ends[0], ends[1]
