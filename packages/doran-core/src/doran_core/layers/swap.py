"""W' in place of W0 in a base layer, and W0 back again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doran_core.errors import DoranError, NonFiniteError, TargetError
from doran_core.layers.base import BaseView

__all__ = ["WeightSwap"]


class WeightSwap:
    """Exchanges a layer's weight parameter for another one and back.

    W0 stays in its own Parameter, out of the layer, while W' is in: so it comes back bit for bit, a weight that two
    modules share (an embedding and the head tied to it) is changed for this layer alone, and the tie is there again
    afterwards. Memory: one more weight while W' is in.
    """

    def __init__(self) -> None:
        self._original: nn.Parameter | None = None

    @property
    def active(self) -> bool:
        """Whether W' is in."""
        return self._original is not None

    def original(self, view: BaseView) -> Tensor | None:
        """W0 ``[d_out, d_in]``, whether W' is in or not; None if the layer hides it."""
        if self._original is None:
            return view.weight()
        current = view.layer.weight
        try:
            view.layer.weight = self._original
            return view.weight()
        finally:
            view.layer.weight = current

    @torch.no_grad()
    def put(self, view: BaseView, merged: Tensor, name: str, *, check_finite: bool = False) -> None:
        """Put W' ``[d_out, d_in]`` in, rounded to the layer's dtype.

        Raises:
            TargetError: if the layer gives no access to its weight.
            NonFiniteError: if the rounded weight has NaN or infinite values and ``check_finite``; nothing is changed.
        """
        current = view.layer.weight if view.weight() is not None else None
        if not isinstance(current, nn.Parameter):
            raise TargetError(
                f"{name}: {type(view.layer).__name__} gives no access to its weight, so it cannot be merged in place; "
                "merge the adapter into the checkpoint instead (doran merge)"
            )
        rounded = torch.empty_like(current).copy_(view.stored(merged))
        if check_finite and not bool(rounded.isfinite().all()):
            raise NonFiniteError(f"{name}: the merged weight has NaN or infinite values in {current.dtype}")
        view.layer.weight = nn.Parameter(rounded, requires_grad=current.requires_grad)
        if self._original is None:
            self._original = current

    def restore(self, view: BaseView) -> None:
        """Put W0 back."""
        if self._original is not None:
            view.layer.weight = self._original
            self._original = None

    def refuse_loading(self, name: str) -> None:
        """Raise if W' is in: values loaded now would be lost when W0 comes back."""
        if self.active:
            raise DoranError(f"{name}: its adapter is merged; unmerge it before loading base weights")
