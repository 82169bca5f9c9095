"""Tied weights of a model in memory, such as an embedding and the output layer, and transformers' flag for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

__all__ = ["FLAG_IN_FORWARD", "base_parameter", "tied_parameters"]

FLAG_IN_FORWARD = frozenset(
    ("longt5", "mt5", "pop2piano", "switch_transformers", "t5", "t5gemma", "t5gemma_module", "udop", "umt5")
)
"""transformers' model types that also scale or choose their outputs by ``tie_word_embeddings``, or by a field made of
it: the flag must stay as it is there, whatever is tied."""

_NOT_THE_BASE = ("doran_adapter", "modules_to_save")
_WRAPPERS = ("base_layer", "original_module", "_orig_mod", "_fsdp_wrapped_module")


def base_parameter(name: str) -> str | None:
    """A parameter's name in the base model, without what adapters, PEFT and torch.compile put around its module.

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
    """Each parameter that is one with another, and its source, by the base model's names.

    What the model declares (transformers' ``all_tied_weights_keys``) counts also while a merge has put one end apart.

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
    """What the outermost models that declare ties say."""
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
