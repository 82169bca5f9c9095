"""Launches of Triton kernels at the price of a launch: a call that was seen before goes past Triton's dispatcher.

Triton inspects and specializes every argument of every call, which takes several times as long as the launch itself and
is what a layer of many small kernels then waits for. Here all that a compiled kernel depends on is one dictionary key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from doran_core.kernels.backend import interpreting

__all__ = ["launch"]

_KNOWN = ((3, 6),)
"""Triton releases whose compiled kernels were seen to take their arguments as :func:`launch` gives them. With others
every call goes through the dispatcher."""

_MOST_KEPT = 4096
"""Batches of ever new sizes would keep ever more."""

_runners: dict[Any, Callable[..., None]] = {}


def _is_known() -> bool:
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) in _KNOWN and not interpreting()


_DIRECT = _is_known()


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], numbers: tuple[float, ...], **flags: Any
) -> None:
    """Launch on the first tensor's device and its current stream.

    Args:
        kernel: a ``triton.jit`` function whose parameters are pointers, then numbers, then constants.
        grid: programs in each dimension.
        tensors: the pointers.
        numbers: sizes, strides and other numbers.
        flags: the constants by name, and options such as ``num_warps``.
    """
    device = tensors[0].get_device()
    if not _DIRECT or device != torch._C._cuda_getDevice():
        _dispatch(kernel, grid, tensors, numbers, flags, device)
        return
    pointers = [tensor.data_ptr() for tensor in tensors]
    union = 0
    for pointer in pointers:
        union |= pointer
    if union & 15:  # which of them are aligned is part of what Triton compiles for
        _dispatch(kernel, grid, tensors, numbers, flags, device)
        return
    constants = flags.values()
    key = (kernel, device, grid, numbers, *constants, *[tensor.dtype for tensor in tensors])
    runner = _runners.get(key)
    if runner is None:
        compiled = _dispatch(kernel, grid, tensors, numbers, flags, device)
        if len(_runners) >= _MOST_KEPT:
            _runners.clear()
        _runners[key] = _runner(kernel, compiled[(*grid, 1, 1)[:3]], flags)
        return
    runner(pointers, numbers, torch._C._cuda_getCurrentRawStream(device))


def _runner(kernel: Any, run: Callable[..., None], flags: dict[str, Any]) -> Callable[..., None]:
    constants = [flags[name] for name in kernel.arg_names if name in flags]

    def runner(pointers: list[int], numbers: tuple[float, ...], stream: int) -> None:
        run(*pointers, *numbers, *constants, stream=stream)

    return runner


def _dispatch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    flags: dict[str, Any],
    device: int,
) -> Any:
    """The ordinary way. Triton launches on the current device; this makes it the tensors'."""
    if device < 0 or device == torch.cuda.current_device():
        return kernel[grid](*tensors, *numbers, **flags)
    with torch.cuda.device(device):
        return kernel[grid](*tensors, *numbers, **flags)
