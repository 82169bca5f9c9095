"""A batch whose rows use different adapters, by PEFT's argument ``adapter_names``. Inference only.

PEFT supports this for LoRA only (not for its DoRA), inside LoraModel. This is the same protocol for DoRAN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from doran_core.errors import ConfigError

__all__ = ["BASE", "adapter_per_row", "check_rows"]

BASE = "__base__"
"""Stands for "no adapter" in ``adapter_names``, as in PEFT."""


def check_rows(where: str, rows: int, adapter_names: Sequence[str], *, merged: bool) -> None:
    """Refuse names that a layer cannot apply row by row.

    Raises:
        ConfigError: another number of names than of rows, or merged adapters.
    """
    if rows != len(adapter_names):
        raise ConfigError(f"{where}: got {len(adapter_names)} adapter_names for {rows} inputs, expected one for each")
    if merged:
        raise ConfigError(
            f"{where}: adapter_names cannot be used while adapters are merged; call unmerge_adapter first"
        )


@contextmanager
def adapter_per_row(
    model: nn.Module, adapter_names: Sequence[str] | None, known: set[str], num_beams: int, layers: type[nn.Module]
) -> Iterator[None]:
    """A context in which the layers of a model get ``adapter_names`` with each call.

    Args:
        model: the base model, adapters inside.
        adapter_names: one per input, "__base__" for none; None changes nothing.
        known: names of the existing adapters.
        num_beams: beams of beam search, which repeats each input (except in an encoder).
        layers: the class of the adapted layers.

    Raises:
        ConfigError: in training mode, or for an unknown name.
    """
    if adapter_names is None:
        yield
        return
    if model.training:
        raise ConfigError("adapter_names is for inference: call model.eval() first")
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ConfigError(f"adapter_names: no adapter {unknown[0]!r}; there are {sorted(known)} and {BASE!r}")
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    get_encoder: Any = getattr(model, "get_encoder", None)
    encoder = get_encoder() if num_beams > 1 and get_encoder is not None else None
    inside = set() if encoder is None or encoder is model else {id(module) for module in encoder.modules()}
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, layers | AuxiliaryTrainingWrapper):
                names = list(adapter_names) if id(module) in inside else repeated
                stack.callback(_hand_over(module, names).remove)
        yield


def _hand_over(module: nn.Module, adapter_names: list[str]) -> RemovableHandle:
    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"adapter_names": adapter_names}

    return module.register_forward_pre_hook(before_forward, with_kwargs=True)
