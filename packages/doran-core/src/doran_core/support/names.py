"""Names of modules and tensors without torch.compile's additions."""

from __future__ import annotations

from torch import nn

from doran_core.support.torch_internals import COMPILED_PART

__all__ = ["plain_modules", "plain_name"]


def plain_name(name: str) -> str:
    """A module's or tensor's name without torch.compile's part."""
    return ".".join(part for part in name.split(".") if part != COMPILED_PART)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by these names; of a compiled module the one inside."""
    return {plain_name(name): module for name, module in model.named_modules()}
