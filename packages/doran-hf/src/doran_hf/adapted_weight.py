"""AdaptedWeight stands in for a module's parameter, and computes products with W' without forming W'.

transformers computes experts in several ways (eager, batched_mm, grouped_mm, and each model's own loop). All of them
index the parameter by expert and multiply, so a stand-in with these few operations serves all of them; routers
multiply, some in float32. For tokens x of one expert ``x W'^T = c * (x W0^T) + (x A^T) B'^T``. Any other operation is
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doran_core.errors import TargetError
from doran_core.functional import accumulation_dtype, adapted_output
from doran_core.kernels.expert_rows import scale_expert_rows

__all__ = ["AdaptedWeight", "WeightSide", "call_with", "refuse_replaced_forward", "summed"]

WeightSide = tuple[Tensor, Tensor, Tensor]
"""Scale c, A and B' of one adapter, as in :class:`AdaptedWeight`."""

_GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "mm"} | _GROUPED


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """``W' = c (W0 + g B A)`` of all experts, of one expert, or of one expert per row of tokens.

    Attributes:
        base: W0 as the module stores it, or transposed.
        scale: c, ``[..., d_out]``, float32 or wider.
        A: ``[..., r, d_in]``.
        B: B', which includes c and g, ``[..., d_out, r]``.
        rows_first: whether the last two dimensions of `base` are ``[d_out, d_in]``; else ``[d_in, d_out]``.
        dropout: dropout on the low-rank branch's input; 0 outside training.
        where: the parameter's name, for messages.
    """

    base: Tensor
    scale: Tensor
    A: Tensor
    B: Tensor
    rows_first: bool
    dropout: float
    where: str

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """The weight's device."""
        return self.base.device

    @property
    def is_cuda(self) -> bool:
        """Whether the weight is on a GPU."""
        return self.base.is_cuda

    @property
    def ndim(self) -> int:
        """The weight's number of dimensions."""
        return self.base.dim()

    def dim(self) -> int:
        """The weight's number of dimensions."""
        return self.base.dim()

    def size(self, *dim: int) -> Any:
        """The weight's size."""
        return self.base.size(*dim)

    def data_ptr(self) -> int:
        """The weight's address."""
        return self.base.data_ptr()

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, experts: Any) -> AdaptedWeight:
        is_index = isinstance(experts, int) or (isinstance(experts, Tensor) and experts.dim() <= 1)
        if self.ndim != 3 or not is_index:
            raise TargetError(f"{self.where}: DoRAN cannot take the part {experts!r} of stacked expert weights")
        parts = (self.base[experts], self.scale[experts], self.A[experts], self.B[experts])
        return AdaptedWeight(*parts, self.rows_first, self.dropout, self.where)

    def transpose(self, first: int, second: int) -> AdaptedWeight:
        """The weight with its last two dimensions exchanged."""
        if {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            raise TargetError(f"{self.where}: DoRAN cannot exchange dimensions {first} and {second} of expert weights")
        return replace(self, base=self.base.mT, rows_first=not self.rows_first)

    @property
    def mT(self) -> AdaptedWeight:
        """The weight with its last two dimensions exchanged."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> AdaptedWeight:
        """The transposed weight of one expert."""
        return self.transpose(0, 1)

    def __getattr__(self, name: str) -> Any:
        if name in ("type", "to", "float") and self.ndim == 2:  # routers, which may compute in float32
            return lambda dtype=torch.float32: replace(self, base=self.base.to(dtype))
        raise AttributeError(f"{self.where}: {_advice(f'reads {name!r} of the weight')}")

    def __matmul__(self, other: Tensor) -> Tensor:
        return self._product(torch.matmul, (self, other), {})

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return self._product(torch.matmul, (other, self), {})

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        here = next((a for a in (*args, *kwargs.values()) if isinstance(a, cls)), None)
        assert here is not None
        if name == "linear" and len(args) >= 2 and here is args[1]:
            return here._linear(*args, **kwargs)
        if name in _PRODUCTS and any(operand is here for operand in args[:2]):
            return here._product(func, args, kwargs)
        raise TargetError(f"{here.where}: {_advice(f'calls {name} with the weight')}")

    def _linear(self, x: Tensor, _: AdaptedWeight, bias: Tensor | None = None) -> Tensor:
        self._require(self.rows_first and self.ndim == 2)
        delta = F.linear(F.linear(self._dropped(x), self.A.to(x.dtype)), self.B.to(x.dtype))
        if bias is None:
            return _scaled_sum(F.linear(x, self.base), self.scale, delta)
        return adapted_output(F.linear(x, self.base, bias), delta, self.scale, bias)

    def _product(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``func(x, W'^T)``, or ``func(W', x)``."""
        if args[0] is self:
            self._require(self.rows_first)
            x, rest = self._dropped(args[1]), args[2:]
            delta = func(self.B, func(self.A, x, *rest, **kwargs), *rest, **kwargs)
            return _scaled_sum(func(self.base, *args[1:], **kwargs), self.scale[..., None], delta)
        self._require(not self.rows_first)
        is_grouped = getattr(func, "__name__", "") in _GROUPED
        A, B = self._aligned() if is_grouped else (self.A, self.B)
        x, rest = self._dropped(args[0]), args[2:]
        delta = func(func(x, A.mT, *rest, **kwargs), B.mT, *rest, **kwargs)
        base_output = func(args[0], self.base, *rest, **kwargs)
        if not is_grouped:
            return _scaled_sum(base_output, self.scale[..., None, :] if self.ndim == 3 else self.scale, delta)
        ends = kwargs["offs"] if "offs" in kwargs else args[2]
        return scale_expert_rows(base_output, delta, self.scale, ends)

    def _aligned(self) -> tuple[Tensor, Tensor]:
        """A and B padded to a rank whose rows take a multiple of 16 bytes, as torch's grouped product requires."""
        lacking = -self.A.shape[-2] % max(1, 16 // self.dtype.itemsize)
        return (F.pad(self.A, (0, 0, 0, lacking)), F.pad(self.B, (0, lacking))) if lacking else (self.A, self.B)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout else x

    def _require(self, fits: bool) -> None:
        if not fits:
            raise TargetError(
                f"{self.where}: the model multiplies along the output dimension of these weights, so their layout is "
                "not the one that is_transposed of their module says"
            )


def summed(sides: Sequence[WeightSide]) -> WeightSide:
    """Several adapters as one: their changes add up, ``sum (c_i W0 + B'_i A_i) - (k - 1) W0``."""
    if len(sides) == 1:
        return sides[0]
    scales, As, Bs = zip(*sides, strict=True)
    return torch.stack(scales).sum(0) - (len(sides) - 1), torch.cat(As, -2), torch.cat(Bs, -1)


def call_with(module: nn.Module, weights: Mapping[str, AdaptedWeight], *args: Any, **kwargs: Any) -> Any:
    """Call a module with stand-ins for the parameters of the same names."""
    shallow = copy.copy(module)  # shares parameters and hooks; attributes set here stay here
    vars(shallow).update(weights)
    return shallow(*args, **kwargs)


def refuse_replaced_forward(module: nn.Module, name: str, remedy: str) -> None:
    """Refuse a module whose call would read the parameters instead of their stand-ins.

    Args:
        module: a router or an experts module.
        name: its name in the base model.
        remedy: what to do if the model must stay as it is loaded; ends the message.

    Raises:
        TargetError: the module's forward has been replaced.
    """
    if "forward" in vars(module):
        raise TargetError(
            f"{name}: {type(module).__name__}.forward has been replaced on this module (by accelerate's device_map or "
            "offload, perhaps), so adapters of its parameters would have no effect; load the model on one device, or "
            f"{remedy}"
        )


def _advice(what: str) -> str:
    return (
        f"its module {what}, which DoRAN does not provide; for experts choose another implementation: "
        "model.set_experts_implementation('eager'), 'batched_mm' or 'grouped_mm'; leave a router out"
    )


def _scaled_sum(base_output: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
    """``c * z + delta``, with the arithmetic in float32 or wider and the dtype of z."""
    dtype = accumulation_dtype(base_output)
    return torch.addcmul(delta.to(dtype), base_output.to(dtype), scale.to(dtype)).to(base_output.dtype)
