"""Modules that put a DoranAdapter around a base layer: DoranLinear, DoranEmbedding, DoranConv2d, DoranConv."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from doran_core.layers.adapter import DoranAdapter, note_loading
from doran_core.layers.base import BaseView, base_view
from doran_core.layers.swap import WeightSwap
from doran_core.method.config import DoranConfig
from doran_core.method.factors import FactorBuilder, LayerSpec, StaticFactors
from doran_core.method.sharing import SharedTrunks, block_of
from doran_core.support.sharding import refuse_zero_init
from doran_core.support.torch_internals import own_modules

__all__ = [
    "AdaptedLayer",
    "DoranConv",
    "DoranConv2d",
    "DoranEmbedding",
    "DoranLinear",
    "layer_spec",
    "make_factor_builder",
    "wrap",
]


def layer_spec(name: str, view: BaseView, config: DoranConfig) -> LayerSpec:
    """The LayerSpec of a layer of this name and size."""
    return LayerSpec(
        name=name,
        block=block_of(name, config.block_pattern),
        d_in=view.d_in,
        d_out=view.d_out,
        rank=config.rank_for(name),
        scaling=config.scaling_for(name),
        experts=view.experts,
    )


def make_factor_builder(config: DoranConfig) -> FactorBuilder:
    """The factor builder for the config. Use one builder per model, because it keeps the sharing groups.

    Raises:
        TargetError: inside deepspeed.zero.Init, which partitions new modules and changes how tensors are made.
    """
    refuse_zero_init(nn.LayerNorm(1), "make_factor_builder")
    return StaticFactors if config.factors == "static" else SharedTrunks(config).build


class AdaptedLayer(nn.Module):
    """A base layer with its adapter.

    Args:
        base_layer: the frozen layer; its parameters are set not to require gradients.
        config: the method's options.
        name: the layer's name in the model; it decides rank, scaling and block.
        factor_builder: makes the factors; pass the same builder to all layers that share a trunk.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        config: DoranConfig | None = None,
        *,
        name: str = "",
        factor_builder: FactorBuilder | None = None,
    ) -> None:
        super().__init__()
        config = config or DoranConfig()
        view = base_view(base_layer, name or type(base_layer).__name__)
        spec = layer_spec(name, view, config)
        factors = (factor_builder or make_factor_builder(config))(spec)
        self.doran_adapter = DoranAdapter(config, spec, factors)
        self.doran_adapter.initialise(view)
        self.base_layer = base_layer
        self._view = view
        for parameter in base_layer.parameters():
            parameter.requires_grad_(False)
        self.enabled = True
        self._swap = WeightSwap()

    @property
    def view(self) -> BaseView:
        """The base layer as a matrix. The layer is checked once, and again only after it was replaced."""
        layer: nn.Module = own_modules(self)["base_layer"]
        if torch.compiler.is_compiling():
            return base_view(layer, self.doran_adapter.spec.name)
        if self._view.layer is not layer or self._view.layer_type is not type(layer):
            self._view = base_view(layer, self.doran_adapter.spec.name)
        return self._view

    @property
    def merged(self) -> bool:
        """Whether the base layer's weight is currently W'."""
        return self._swap.active

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that reads a layer's dtype or device."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.view.bias

    @property
    def in_features(self) -> int:
        """Columns of the weight seen as a matrix."""
        return self.doran_adapter.spec.d_in

    @property
    def out_features(self) -> int:
        """Rows of the weight seen as a matrix."""
        return self.doran_adapter.spec.d_out

    def adapter_in_use(self) -> tuple[DoranAdapter, BaseView] | None:
        """Adapter and base view for the next call; None while merged or disabled."""
        return None if self.merged or not self.enabled else (self.doran_adapter, self.view)

    def original_weight(self) -> Tensor | None:
        """W0 ``[d_out, d_in]``, also while merged; None if the base layer gives no access to it."""
        return self._swap.original(self.view)

    def whole_weight(self) -> AbstractContextManager[Tensor | None]:
        """A context that yields W0 as :meth:`original_weight` does, gathered from all processes if it is sharded."""
        return self._swap.whole_original(self.view)

    def base_digest(self) -> bytes | None:
        """Digest of W0; of a sharded W0, the digest taken with its norm. None if W0 is quantized or float16."""
        return self.doran_adapter.digest_of_base(self._swap, self.view)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output; shapes as in the base layer."""
        in_use = self.adapter_in_use()
        if in_use is None:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        adapter, view = in_use
        adapted: Tensor = adapter(view, x, self.base_layer(x, *args, **kwargs) if args or kwargs else None)
        return adapted

    @torch.no_grad()
    def merge(self, *, check_finite: bool = False) -> None:
        """Replace W0 by W' and keep W0, so that :meth:`unmerge` is exact.

        Raises:
            NonFiniteError: if W' is not finite in the layer's dtype and ``check_finite``.
            TargetError: if the base layer gives no access to its weight.
        """
        if self.merged:
            return
        view, name = self.view, self.doran_adapter.spec.name
        self._swap.check(view, name)
        with self.whole_weight() as weight:
            merged = torch.empty(0) if weight is None else self.doran_adapter.merged_weight(weight)
        self._swap.put(view, merged, name, check_finite=check_finite)

    def release(self, trained: Collection[int]) -> None:
        """Make a merged weight trainable if W0 was, before the adapter is removed.

        Args:
            trained: ``id`` of the parameters that trained before the layer was adapted.
        """
        self._swap.release(self.view, trained)

    def unmerge(self) -> None:
        """Put W0 back, bit for bit."""
        self._swap.restore(self.view)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self._swap.refuse_loading(self.doran_adapter.spec.name, state_dict, prefix)
        note_loading(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DoranLinear(AdaptedLayer):
    """DoRAN around a linear layer: nn.Linear, a Conv1D with transposed weight, or a quantized linear.

    x ``[..., d_in]`` to ``[..., d_out]``.
    """


class DoranEmbedding(AdaptedLayer):
    """DoRAN around nn.Embedding, whose matrix is seen as ``[dim, num_embeddings]``. Tokens to ``[..., dim]``."""


class DoranConv2d(AdaptedLayer):
    """DoRAN around nn.Conv2d; the norm is taken per output channel."""


class DoranConv(AdaptedLayer):
    """DoRAN around nn.Conv1d or nn.Conv3d, likewise."""


def wrap(
    base_layer: nn.Module, config: DoranConfig, *, name: str = "", factor_builder: FactorBuilder | None = None
) -> AdaptedLayer:
    """The module that fits a base layer.

    Raises:
        TargetError: if DoRAN cannot adapt it.
    """
    kinds: dict[str, type[AdaptedLayer]] = {"embedding": DoranEmbedding, "conv2d": DoranConv2d, "conv": DoranConv}
    layer_class = kinds.get(base_view(base_layer, name).kind, DoranLinear)
    return layer_class(base_layer, config, name=name, factor_builder=factor_builder)
