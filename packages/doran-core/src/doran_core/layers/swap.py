"""Replace W0 by W' in a base layer, and restore W0."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from doran_core.errors import DoranError, NonFiniteError, TargetError
from doran_core.layers.base import BaseView
from doran_core.support.sharding import is_dtensor, shard_like, whole_shape
from doran_core.support.torch_internals import own_parameters

__all__ = ["WeightSwap"]


class WeightSwap:
    """Exchanges a layer's weight parameter, and restores it.

    While W' is in, W0 stays in its own Parameter outside of the layer. So W0 comes back bit for bit. A weight that two
    modules share (an embedding and the head tied to it) changes for this layer alone, and restoring W0 restores the
    tie. Memory: one more weight while W' is in.
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
        current = getattr(view.layer, view.parameter)
        try:
            setattr(view.layer, view.parameter, self._original)
            return view.weight()
        finally:
            setattr(view.layer, view.parameter, current)

    @contextmanager
    def whole_original(self, view: BaseView) -> Iterator[Tensor | None]:
        """W0 ``[d_out, d_in]`` as in :meth:`original`. A sharded W0 is gathered, so all processes must call this."""
        current = own_parameters(view.layer).get(view.parameter)
        try:
            if self._original is not None:
                setattr(view.layer, view.parameter, self._original)
            with view.whole_weight() as weight:
                yield weight
        finally:
            if self._original is not None:
                setattr(view.layer, view.parameter, current)

    @staticmethod
    def check(view: BaseView, name: str) -> None:
        """Refuse a weight that this process does not have in full.

        Raises:
            TargetError: names the call that gathers the weight.
        """
        view.refuse_flattened()
        weight = own_parameters(view.layer).get(view.parameter)
        if weight is not None and (weight.is_meta or weight.shape != whole_shape(weight)):
            raise TargetError(
                f"{name}: its weight is partitioned by ZeRO-3 or offloaded; merge inside "
                "deepspeed.zero.GatheredParameters(model.parameters()), or merge the checkpoint (doran merge)"
            )

    @torch.no_grad()
    def put(self, view: BaseView, merged: Tensor, name: str, *, check_finite: bool = False) -> None:
        """Set W' ``[d_out, d_in]``, rounded to the layer's dtype.

        Raises:
            TargetError: if the layer gives no access to its weight.
            NonFiniteError: if the rounded weight has NaN or infinite values and ``check_finite``; nothing is changed.
        """
        current = own_parameters(view.layer).get(view.parameter)
        if view.kind == "opaque" or current is None:
            raise TargetError(
                f"{name}: {type(view.layer).__name__} gives no access to its weight, so it cannot be merged in place; "
                "merge the adapter into the checkpoint instead (doran merge)"
            )
        rounded = view.stored(merged).to(current.dtype, memory_format=torch.contiguous_format)
        if check_finite and not bool(rounded.isfinite().all()):
            raise NonFiniteError(f"{name}: the merged weight has NaN or infinite values in {current.dtype}")
        if is_dtensor(current):  # FSDP2 gathers from this very memory
            if self._original is None:
                self._original = nn.Parameter(current.detach().clone(), requires_grad=False)
            current.copy_(shard_like(rounded, current))
            return
        setattr(view.layer, view.parameter, nn.Parameter(rounded, requires_grad=current.requires_grad))
        if self._original is None:
            self._original = current

    def release(self, view: BaseView, trained: Collection[int]) -> None:
        """Make W' trainable if W0 is among the parameters with these ids."""
        if self._original is not None:
            cast(Tensor, getattr(view.layer, view.parameter)).requires_grad_(id(self._original) in trained)

    def restore(self, view: BaseView) -> None:
        """Put W0 back."""
        if self._original is None:
            return
        current = cast(Tensor, getattr(view.layer, view.parameter))
        if is_dtensor(current) != is_dtensor(self._original):
            raise TargetError(
                f"{type(view.layer).__name__}: FSDP2 has gathered its weight since it was merged, or shards it since; "
                "call reshard() of the FSDP2 modules before unmerging"
            )
        if is_dtensor(current):
            with torch.no_grad():
                current.copy_(self._original)
        else:
            setattr(view.layer, view.parameter, self._original)
        self._original = None

    def refuse_loading(self, name: str, state_dict: Mapping[str, object], prefix: str) -> None:
        """Refuse to load base weights while W' is in: unmerging would discard them.

        Args:
            name: the adapted layer's name, for the error.
            state_dict: the tensors to load.
            prefix: of the adapted layer's keys in it.

        Raises:
            DoranError: W' is in, and the state dict has weights of the base layer.
        """
        if self.active and any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            raise DoranError(f"{name}: its adapter is merged; unmerge it before loading base weights")
