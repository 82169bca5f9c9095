"""What an adapter says of the base model that it is on, and the check of it on loading."""

from __future__ import annotations

from typing import Any

from torch import nn

from doran_core.checkpoint.fingerprint import combine_digests
from doran_core.errors import BaseMismatchError
from doran_hf.config import DoranConfig
from doran_hf.layer import doran_layers

__all__ = ["base_fingerprint", "check_base", "module_kinds"]


def base_fingerprint(model: nn.Module, adapter_name: str) -> str | None:
    """Fingerprint of the weights that this adapter adapts.

    Returns:
        The fingerprint; of sharded or offloaded weights as they were when the adapter was made. None where memory does
        not hold the checkpoint's values: float16, quantized, or not loaded at all (meta device).
    """
    digests = []
    for layer in doran_layers(model, adapter_name):
        digest = layer.base_digest(adapter_name)
        if digest is None:
            return None
        digests.append((layer.name, digest))
    return combine_digests(digests) if digests else None


def module_kinds(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Kinds of the adapted layers that are not plain linear ones, by module name."""
    kinds = {layer.name: layer.view.kind for layer in doran_layers(model, adapter_name)}
    return {name: kind for name, kind in kinds.items() if kind not in ("linear", "opaque")}


def check_base(model: nn.Module, adapter_name: str, config: DoranConfig) -> None:
    """Refuse a base model other than the one that a loaded adapter was made for.

    Raises:
        BaseMismatchError: naming both fingerprints.
    """
    if config.base_fingerprint is None:
        return
    found = base_fingerprint(model, adapter_name)
    if found is not None and found != config.base_fingerprint:
        raise BaseMismatchError(
            f"adapter {adapter_name!r} was made for the base weights {config.base_fingerprint}"
            f"{_of(config.base_model_name_or_path)}, but the weights of this {type(model).__name__} are {found}. To "
            "load it all the same, set base_fingerprint and digest to null in its adapter_config.json"
        )


def _of(name: Any) -> str:
    return f" ({name})" if name else ""
