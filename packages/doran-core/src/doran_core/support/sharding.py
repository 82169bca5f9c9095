"""Tensors that this process does not have in full: sharded by FSDP or DeepSpeed ZeRO, or offloaded by accelerate.

No import of those libraries: a sharded or offloaded tensor shows by its type or by the marks that they put on it.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from doran_core.errors import TargetError
from doran_core.support.torch_internals import FSDP1_MARK, own_parameters

__all__ = [
    "carried",
    "first_process",
    "gathered",
    "held",
    "is_dtensor",
    "is_flattened",
    "is_sharded",
    "is_whole",
    "offload_hook",
    "read",
    "refuse_zero_init",
    "reshard",
    "shard_like",
    "whole",
    "whole_shape",
]

_PLAIN = (Tensor, nn.Parameter)
_ZERO = "ds_id"
"""DeepSpeed ZeRO-3's mark on a parameter that it partitions."""
_ZERO_COPY = "_hp_mapping"
"""The mark of DeepSpeed's other stages on a parameter whose float32 copy the optimizer has."""


def held(layer: nn.Module, name: str) -> Any:
    """A layer's parameter or attribute; a parameter without the look-up that ZeRO-3 answers by gathering it."""
    found = own_parameters(layer).get(name)
    return getattr(layer, name, None) if found is None else found


def offload_hook(layer: nn.Module) -> Any:
    """accelerate's hook, which moves an offloaded layer's weights for each call; None if it has none.

    A private name of accelerate, until that says of a module whether its weights are elsewhere.
    """
    return getattr(layer, "_hf_hook", None)


def is_flattened(tensor: Tensor) -> bool:
    """Whether FSDP1 keeps it in its flat parameter."""
    return hasattr(tensor, FSDP1_MARK)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: FSDP2's parameters outside their unit's forward pass, and tensor parallel ones."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "full_tensor")


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP or ZeRO may take the tensor's memory away between two uses."""
    return is_dtensor(tensor) or hasattr(tensor, _ZERO) or is_flattened(tensor)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor, also where this process holds none of it."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def is_whole(tensor: Tensor, numel: int) -> bool:
    """Whether this process can read all `numel` values, now and until the computation is over."""
    if type(tensor) in _PLAIN:
        return tensor.numel() == numel and not tensor.is_meta and not hasattr(tensor, _ZERO)
    return not is_dtensor(tensor) and tensor.numel() == numel and not tensor.is_meta


def read(parameter: Tensor, dims: int = 0) -> Tensor:
    """A parameter as the formulas use it: whole, in float32 or wider, differentiable.

    Args:
        parameter: the parameter, or this process's part of it.
        dims: the fewest dimensions that a whole parameter has; FSDP1's parts have one.

    Mixed precision hands float32 parameters over in half precision. A DTensor, outside its FSDP2 unit, is gathered
    here; its gradient is the mean over the processes, as FSDP2's own.

    Raises:
        TargetError: under FSDP1, outside the unit that owns the parameter: its gradient would be lost.
    """
    if type(parameter) not in _PLAIN and is_dtensor(parameter):
        parameter = _Gathered.apply(parameter)  # type: ignore[no-untyped-call]
    elif is_flattened(parameter) and (parameter.dim() < dims or (parameter.requires_grad and torch.is_grad_enabled())):
        raise TargetError(
            "FSDP1: a layer's networks are used outside the FSDP unit that owns them (sharing='model', or a factor "
            "penalty), where FSDP1 loses their gradient; use FSDP2 (fully_shard), or sharing='block' without a penalty"
        )
    if parameter.dtype.itemsize >= 4:
        return parameter
    if not torch.compiler.is_compiling():
        _warn_of_rounded(parameter)
    return parameter.float()


def _warn_of_rounded(parameter: Tensor) -> None:
    """Warn if DeepSpeed rounded a parameter before the optimizer took its float32 copy."""
    if hasattr(parameter, _ZERO) or hasattr(parameter, _ZERO_COPY):
        warnings.warn(
            f"DeepSpeed has rounded the adapter to {str(parameter.dtype).removeprefix('torch.')}, and its optimizer "
            "started from the rounded values. A rounded magnitude moves the model away from the pretrained one. Turn "
            "DeepSpeed's bf16 and fp16 off (Trainer: bf16=False; accelerate: mixed_precision 'no'), and load the base "
            "model in bfloat16",
            RuntimeWarning,
            stacklevel=3,
        )


def refuse_zero_init(made: nn.Module, name: str) -> None:
    """Refuse to make an adapter where new modules are in parts from the first on.

    Args:
        made: a module that was just made.
        name: the layer, for the message.
    """
    if any(is_sharded(parameter) for parameter in made.parameters()):
        raise TargetError(
            f"{name}: an adapter cannot be made inside deepspeed.zero.Init(); make the base model there, and adapt it "
            "after the context"
        )


def carried(parameter: Tensor) -> Tensor:
    """As :func:`read`, for a forward that returns the parameter: ZeRO-3 frees it there."""
    value = read(parameter)
    return value.clone() if hasattr(value, _ZERO) else value


class _Gathered(torch.autograd.Function):
    """A DTensor's whole tensor; the gradient is averaged over its mesh and sharded again."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.mesh, ctx.placements = tensor.device_mesh, tensor.placements
        return tensor.full_tensor()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        from torch import distributed
        from torch.distributed.tensor import distribute_tensor

        grad = grads[0].contiguous()
        for dim in range(ctx.mesh.ndim):
            distributed.all_reduce(grad, group=ctx.mesh.get_group(dim))
        return distribute_tensor(grad / ctx.mesh.size(), ctx.mesh, ctx.placements, src_data_rank=None)


@torch.no_grad()
def whole(tensor: Tensor, where: str) -> Tensor:
    """A detached whole tensor; a collective operation for a DTensor. Call it inside :func:`gathered`.

    Raises:
        TargetError: FSDP1 or ZeRO-3 holds a part of it, and nothing has gathered the parts.
    """
    if is_dtensor(tensor):
        return tensor.full_tensor()  # type: ignore[attr-defined, no-any-return]
    if tensor.is_meta:
        raise TargetError(f"{where}: its weight is on the meta device; load the base model's weights first")
    if hasattr(tensor, _ZERO) and tensor.shape != whole_shape(tensor):
        raise TargetError(f"{where}: ZeRO-3 holds a part of its weight; gather it (deepspeed.zero.GatheredParameters)")
    return tensor.detach()


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 still has gathered after a pass, such as a root's weights: a write to that would be lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, placed as a DTensor is; anything else as it is."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device, like.dtype), mesh, placements, src_data_rank=None)


@contextlib.contextmanager
def first_process(parameters: Iterable[Tensor]) -> Iterator[bool]:
    """A context whose value says whether this process writes: only rank 0 does where the parameters are sharded.

    The other processes leave the context when rank 0 does.
    """
    if not any(map(is_sharded, parameters)) or not torch.distributed.is_initialized():
        yield True
        return
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.barrier()


@contextlib.contextmanager
def gathered(layer: nn.Module, *, recurse: bool = False) -> Iterator[None]:
    """A context in which ZeRO-3's partitioned and accelerate's offloaded parameters of a layer are here, to read.

    Args:
        layer: it, and with `recurse` the modules inside.
        recurse: see `layer`.
    """
    with contextlib.ExitStack() as stack:
        away = [p for p in layer.parameters(recurse) if hasattr(p, _ZERO) and p.shape != whole_shape(p)]
        if away:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(away))
        for module in layer.modules() if recurse else (layer,):
            hook = offload_hook(module)
            if hook is not None and any(p.is_meta for p in module.parameters(recurse=False)):
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield
