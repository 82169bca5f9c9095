"""Names of modules and tensors without torch.compile's additions.

``_orig_mod`` is private to PyTorch: a compiled module keeps the module that it was given under that name. It goes when
a compiled module has the names of the original, as ``module.compile()`` leaves them.
"""

from __future__ import annotations

from torch import nn

__all__ = ["plain_modules", "plain_name"]


def plain_name(name: str) -> str:
    """A module's or tensor's name without torch.compile's part."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by these names; of a compiled module the one inside."""
    return {plain_name(name): module for name, module in model.named_modules()}
