"""Every private name of PyTorch and Triton that doran-core and doran-hf use, each with why and what would make it go.

A test checks that each still exists.
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ATTRIBUTES",
    "COMPILED_PART",
    "FSDP1_MARK",
    "FSDP1_PART",
    "NAMES",
    "apply_directly",
    "backward_pass",
    "call_hooks",
    "convolve",
    "current_stream",
    "direct_launch",
    "distributed_data_parallel",
    "has_saved_tensor_hooks",
    "is_observed",
    "is_replica",
    "needs_single_operations",
    "own_buffers",
    "own_modules",
    "own_parameters",
    "remove_hooks",
    "storage_of",
    "uncompiled",
    "uses_fully_shard",
    "version",
    "without_view",
]

_C, _LAUNCH = "torch._C", "Triton's own launch takes under 10 microseconds"
NAMES: tuple[tuple[str, str, str, str], ...] = (
    (_C, "_current_graph_task_id", "a checkpoint's recomputation", "torch.utils.checkpoint tells it publicly"),
    ("torch._C._autograd", "_top_saved_tensors_default_hooks", "non-reentrant checkpointing", "likewise"),
    (
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "_active_ddp_module",
        "DDP fails at parameters that two backward passes inside one use",
        "DDP takes them, or a module can ask whether DDP calls it",
    ),
    (_C, "_are_functorch_transforms_active", "vmap and grad take the reference", "torch.func has a query"),
    (_C, "_len_torch_dispatch_stack", "modes, as of selective checkpointing, see operations", "they have a query"),
    (_C, "_get_tracing_state", "a trace must not hold weight sides as constants", "torch.jit.trace is gone"),
    ("torch.ops.aten", "_unsafe_view", "a Function may return no view", "it may return one of what it made itself"),
    (_C, "_cuda_getCurrentRawStream", "the stream of a launch past Triton's dispatcher", _LAUNCH),
    (_C, "_cuda_getDevice", "likewise its device", _LAUNCH),
    (_C, "_FunctionBase", "apply without a look at every argument", "Function.apply takes no microseconds for it"),
    (
        "torch.distributed._composable_state", "_module_state_mapping",
        "fully_shard takes parameters' memory away between forward and backward", "modules tell it publicly",
    ),
    ("torch.nn.modules.module", "_global_forward_hooks", "hooks on a base layer's call", "nn.Module has a query"),
    ("torch.nn.Conv2d", "_conv_forward", "a convolution with its padding mode and another kernel", "it takes kernels"),
)  # fmt: skip
"""``(module, name, why, removed when)``."""

_OWN = "attribute look-up of nn.Module takes microseconds, and ZeRO-3 answers it by gathering", "nn.Module has a query"
_HOOKS = "hooks that see a module's calls", "nn.Module has a query"
_COPIED = "a copied model has hooks without the handles that would remove them", "nn.Module removes hooks by name"
ATTRIBUTES: tuple[tuple[type, str, str, str], ...] = (
    (nn.Module, "_parameters", *_OWN),
    (nn.Module, "_buffers", *_OWN),
    (nn.Module, "_modules", *_OWN),
    (nn.Module, "_forward_pre_hooks", *_HOOKS),
    (nn.Module, "_forward_hooks", *_HOOKS),
    (nn.Module, "_forward_pre_hooks_with_kwargs", *_COPIED),
    (nn.Module, "_forward_hooks_with_kwargs", *_COPIED),
    (nn.Module, "_forward_hooks_always_called", *_COPIED),
    (nn.Module, "_backward_pre_hooks", *_HOOKS),
    (nn.Module, "_backward_hooks", *_HOOKS),
    (Tensor, "_version", "writes to a parameter", "Tensor has a public counter"),
    (torch.UntypedStorage, "_cdata", "which memory a tensor has, wherever FSDP2 moves it", "storages have a public id"),
)
"""Attributes of objects: ``(class, name, why, removed when)``."""

COMPILED_PART = "_orig_mod"
"""torch.compile's name for the module that it was given. It goes when a compiled module has the names of the original,
as ``module.compile()`` leaves them."""
FSDP1_PART = "_fsdp_wrapped_module"
"""FSDP1's name for the module that it wraps; it goes with FSDP1, which PyTorch deprecates."""
FSDP1_MARK = "_fsdp_flattened"
"""FSDP1's mark on a parameter that is a view of its flat one; likewise."""

version: Callable[[Tensor], int] = operator.attrgetter("_version")
"""PyTorch's counter of writes to a tensor; inference tensors have none."""


def storage_of(tensor: Tensor) -> int:
    """Tells the tensor's memory from other memory. FSDP2 frees it and gathers it elsewhere, under the same number."""
    number: int = tensor.untyped_storage()._cdata
    return number


_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS: list[Mapping[Any, Any]] = [getattr(torch.nn.modules.module, f"_global{kind}") for kind in _KINDS]

call_hooks: Callable[[nn.Module], tuple[Mapping[Any, Any], ...]] = operator.attrgetter(*_KINDS)
"""The dictionaries of hooks that see a module's calls."""


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The dictionary in which a module has its own parameters, None for those that it could have."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """The same of buffers."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, Any]:
    """The same of modules."""
    return module._modules


def is_observed(module: nn.Module) -> bool:
    """Whether any hook, a global one included, sees the module's calls."""
    return any(call_hooks(module)) or any(_GLOBAL_HOOKS)


def remove_hooks(module: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Remove a module's forward hooks and forward pre-hooks of which ``is_ours`` is true."""
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        for key in [key for key, hook in getattr(module, kind).items() if is_ours(hook)]:
            for part in ("", "_with_kwargs", "_always_called"):
                getattr(module, kind + part, {}).pop(key, None)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile was given, or the module itself."""
    return getattr(model, COMPILED_PART, model)


def convolve(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, kernels: Tensor) -> Tensor:
    """What a convolution without a bias makes of x, with these kernels in place of its own."""
    return layer._conv_forward(x, kernels, None)  # type: ignore[no-any-return]


def backward_pass() -> int:
    """A number of the backward pass that is running in this thread; -1 if there is none."""
    return int(torch._C._current_graph_task_id())


def has_saved_tensor_hooks() -> bool:
    """Whether hooks pack what autograd saves: non-reentrant checkpointing, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def distributed_data_parallel() -> torch.nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass is running, or None."""
    return torch.nn.parallel.DistributedDataParallel._active_ddp_module


def needs_single_operations() -> bool:
    """Whether torch.func, a TorchDispatchMode or torch.jit.trace must see every operation."""
    modes = torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
    return bool(modes or torch._C._are_functorch_transforms_active())


def without_view(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A reshape that autograd does not take for a view."""
    return torch.ops.aten._unsafe_view.default(rows, shape)  # type: ignore[no-any-return]


def apply_directly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its check for function transforms."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def uses_fully_shard() -> bool:
    """Whether any module of this process was given to ``fully_shard`` (or another composable wrapper)."""
    state = sys.modules.get("torch.distributed._composable_state")
    return bool(state is not None and getattr(state, "_module_state_mapping", True))


def is_replica(module: nn.Module) -> bool:
    """Whether nn.DataParallel made this module, for one call in a thread of its own."""
    return "_is_replica" in vars(module)


def current_stream(device: torch.device) -> int:
    """The device's current stream; 0 on the CPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


_TRITON_WITH_KNOWN_LAUNCH = ((3, 6),)
"""Triton releases whose compiled kernels were seen to take ``(*pointers, *numbers, *constants, stream=)``. With others
every launch goes through the dispatcher."""

_launches: dict[Any, Callable[..., None]] = {}
_MOST_LAUNCHES = 4096
"""Batches of ever new sizes would keep ever more launches."""


def direct_launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], numbers: tuple[float, ...], **flags: Any
) -> None:
    """Launch a Triton kernel, past its dispatcher once the same launch was seen: 13 instead of 28 microseconds.

    All that a compiled kernel depends on is the key of a dictionary.

    Args:
        kernel: a ``triton.jit`` function whose parameters are pointers, then numbers, then constants.
        grid: programs in each dimension.
        tensors: the pointers, on the device to launch on.
        numbers: sizes, strides and other numbers.
        flags: the constants by name, and options such as ``num_warps``.
    """
    device = tensors[0].get_device()
    if device < 0 or device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):  # Triton launches on the current device; -1, the CPU's, changes none
            kernel[grid](*tensors, *numbers, **flags)
        return
    pointers = [tensor.data_ptr() for tensor in tensors]
    misaligned = functools.reduce(operator.or_, pointers) & 15  # Triton compiles for aligned pointers apart
    key = (kernel, device, grid, numbers, misaligned, *flags.values(), *[tensor.dtype for tensor in tensors])
    run = _launches.get(key)
    if run is not None:
        run(pointers, torch._C._cuda_getCurrentRawStream(device))
        return
    compiled = kernel[grid](*tensors, *numbers, **flags)
    if misaligned or not _launch_is_known():
        return
    if len(_launches) >= _MOST_LAUNCHES:
        _launches.clear()
    constants = [flags[name] for name in kernel.arg_names if name in flags]
    start = compiled[(*grid, 1, 1)[:3]]
    _launches[key] = lambda pointers, stream: start(*pointers, *numbers, *constants, stream=stream)


@functools.cache
def _launch_is_known() -> bool:
    release = importlib.import_module("triton").__version__
    return tuple(map(int, release.split(".")[:2])) in _TRITON_WITH_KNOWN_LAUNCH
