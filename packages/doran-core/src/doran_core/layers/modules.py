"""Modules that put a DoranAdapter around a base layer: DoranLinear, DoranEmbedding, DoranConv2d."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doran_core.blocks import SharedTrunks, block_of
from doran_core.config import DoranConfig
from doran_core.errors import DoranError
from doran_core.factors import FactorBuilder, LayerSpec, StaticFactors
from doran_core.layers.adapter import DoranAdapter
from doran_core.layers.base import BaseView, base_view

__all__ = ["DoranConv2d", "DoranEmbedding", "DoranLayer", "DoranLinear", "layer_spec", "make_factor_builder", "wrap"]


def layer_spec(name: str, view: BaseView, config: DoranConfig) -> LayerSpec:
    """What the config makes of a layer of this name and size."""
    return LayerSpec(
        name=name,
        block=block_of(name, config.block_pattern),
        d_in=view.d_in,
        d_out=view.d_out,
        rank=config.rank_for(name),
        scaling=config.scaling_for(name),
    )


def make_factor_builder(config: DoranConfig) -> FactorBuilder:
    """The builder that the config asks for. One builder serves one model: it remembers the sharing groups."""
    return StaticFactors if config.factors == "static" else SharedTrunks(config).build


class DoranLayer(nn.Module):
    """A base layer with its adapter.

    Args:
        base_layer: the frozen layer; its parameters are set not to require gradients.
        config: the method's options.
        name: the layer's name in the model; it decides rank, scaling and block.
        factor_builder: makes the factors; pass one builder to all layers that are to share a trunk.
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
        self.base_layer = base_layer.requires_grad_(False)
        self.doran_adapter = DoranAdapter(config, spec, factors)
        self.doran_adapter.initialise(view)
        self.enabled = True
        self._unmerged: Tensor | None = None

    @property
    def view(self) -> BaseView:
        """The base layer as a matrix."""
        return base_view(self.base_layer, self.doran_adapter.spec.name)

    @property
    def merged(self) -> bool:
        """Whether the base layer's weight now is W'."""
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        """Shapes of the base layer."""
        base_output: Tensor = self.base_layer(x)
        if self.merged or not self.enabled:
            return base_output
        adapted: Tensor = self.doran_adapter(self.view, x, base_output)
        return adapted

    @torch.no_grad()
    def merge(self, *, check_finite: bool = False) -> None:
        """Put W' in place of W0 and keep a copy of W0, so that :meth:`unmerge` is exact.

        Raises:
            DoranError: if W' is not finite and ``check_finite``.
            TargetError: if the base layer gives no access to its weight.
        """
        if self.merged:
            return
        view = self.view
        weight = view._reachable_weight()
        merged = self.doran_adapter.merged_weight(weight)
        if check_finite and not bool(merged.isfinite().all()):
            raise DoranError(f"{self.doran_adapter.spec.name}: the merged weight has NaN or infinite values")
        original = weight.detach().clone()
        view.copy_weight_(merged)
        self._unmerged = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W0 back, bit for bit."""
        if self._unmerged is not None:
            self.view.copy_weight_(self._unmerged)
            self._unmerged = None


class DoranLinear(DoranLayer):
    """DoRAN around a linear layer: nn.Linear, a Conv1D with transposed weight, or a quantized linear.

    x ``[..., d_in]`` to ``[..., d_out]``.
    """


class DoranEmbedding(DoranLayer):
    """DoRAN around nn.Embedding, whose matrix is seen as ``[dim, num_embeddings]``. Tokens to ``[..., dim]``."""


class DoranConv2d(DoranLayer):
    """DoRAN around nn.Conv2d with one group; the norm is taken per output channel."""


def wrap(
    base_layer: nn.Module, config: DoranConfig, *, name: str = "", factor_builder: FactorBuilder | None = None
) -> DoranLayer:
    """The module that fits a base layer.

    Raises:
        TargetError: if DoRAN cannot adapt it.
    """
    kinds: dict[str, type[DoranLayer]] = {"embedding": DoranEmbedding, "conv2d": DoranConv2d}
    layer_class = kinds.get(base_view(base_layer, name).kind, DoranLinear)
    return layer_class(base_layer, config, name=name, factor_builder=factor_builder)
