"""Which implementation computes an adapted layer: chosen by device, or set by hand. Imports no kernel."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from doran_core.errors import BackendError

__all__ = ["Backend", "Implementation", "choose", "get_backend", "set_backend", "use_backend"]

Implementation = Literal["reference", "torch", "triton"]
"""``reference``: the formulas of doran_core.functional under autograd. ``torch``: the same function with a backward
written by hand, which keeps and copies less. ``triton``: that, with fused passes on the GPU."""

Backend = Literal["auto", "reference", "torch", "triton"]
"""What a user may ask for: an implementation, or ``auto``, triton where it can run and else torch."""

_VARIABLE = "DORAN_BACKEND"
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_LEAST_CAPABILITY = (8, 0)
"""Below it Triton makes no use of a GPU's matrix units."""
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(name: str, source: str) -> Backend:
    for known in get_args(Backend):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise BackendError(f"{source}: expected one of {list(get_args(Backend))}, got {name!r}")


_current: Backend = _check(os.environ.get(_VARIABLE) or "auto", f"environment variable {_VARIABLE}")


def get_backend() -> Backend:
    """What is asked for now."""
    return _current


def set_backend(name: Backend) -> None:
    """Ask for an implementation, for all layers and threads of this process. At the start it is ``$DORAN_BACKEND``.

    Embeddings, convolutions and layers with a trained bias have the reference alone, whatever is asked for.

    Raises:
        BackendError: an unknown name; or triton, and it cannot run on this machine at all.
    """
    global _current
    checked = _check(name, "set_backend")
    if checked == "triton":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if reason := _triton_cannot(device, torch.float32):
            raise BackendError(f"backend 'triton' cannot run here: {reason}")
    _current = checked


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """:func:`set_backend` for the time of a ``with`` block."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def choose(device: torch.device, dtype: torch.dtype) -> Implementation:
    """The implementation for tensors of this device and dtype.

    Raises:
        BackendError: triton was asked for by name and cannot run on them.
    """
    return _choose(_current, device, dtype)


@functools.cache
def _choose(backend: Backend, device: torch.device, dtype: torch.dtype) -> Implementation:
    if backend in ("reference", "torch"):
        return backend
    reason = _triton_cannot(device, dtype)
    if backend == "triton" and reason is not None:
        raise BackendError(f"backend 'triton' cannot run on this layer: {reason}")
    return "torch" if reason is not None or (backend == "auto" and torch.version.hip) else "triton"


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _triton_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _TRITON_INSTALLED:
        return "Triton is not installed (pip install 'doran-core[triton]')"
    if device.type != "cuda" and not interpreting():
        return f"the tensors are on {device}, not on a CUDA device"
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"{device} has a compute capability below {'.'.join(map(str, _LEAST_CAPABILITY))}, which Triton asks for"
    if dtype not in _TRITON_DTYPES:
        return f"the dtype is {dtype}, the kernels know {list(_TRITON_DTYPES)}"
    return None
