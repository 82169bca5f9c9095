"""Evaluate an adapter of any form: plain factors A and B, one record per layer. Needs no base weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from doran_core.adapter.schema import AnyAdapter, FoldedAdapter, Kind, TrainableAdapter
from doran_core.adapter.validate import own_generator_parts
from doran_core.errors import AdapterFormatError
from doran_core.layers.adapter import DoranAdapter
from doran_core.layers.rebuild import build_adapters
from doran_core.method.factors import FactorBuilder
from doran_core.support.sharding import read

__all__ = ["LayerFactors", "evaluate", "layer_factors"]


@dataclass(frozen=True)
class LayerFactors:
    """One layer: ``W' = c (W0 + g B A)`` with ``c = m / (||W0 + g B A|| + tau)``, or c as given.

    Attributes:
        name: the module's name in the adapter.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scaling: g.
        magnitude: m ``[d_out]``, or None where `scale` is given.
        tau: ``[1]``, ``[d_out]`` or a number.
        scale: c ``[d_out]`` where it is known without the base (folded; LoRA, whose c is 1), else None.
        kind: layout of the base's weight, if the adapter records it.
        stack: the parameter that the layer is one expert of; None for an ordinary layer.
        expert: its number in the stack.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None
    tau: Tensor | float
    scale: Tensor | None
    kind: Kind | None
    stack: str | None = None
    expert: int = 0

    def rows(self, rows: slice) -> LayerFactors:
        """The layer that these rows are by themselves."""
        tau = self.tau[rows] if isinstance(self.tau, Tensor) and self.tau.numel() > 1 else self.tau
        magnitude, scale = (None if vector is None else vector[rows] for vector in (self.magnitude, self.scale))
        return replace(self, B=self.B[rows], magnitude=magnitude, tau=tau, scale=scale)

    @property
    def sizes(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        return self.B.shape[0], self.A.shape[1]

    def double(self) -> LayerFactors:
        """A copy in float64, for arithmetic on many slices of rows."""

        def widen(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.double()

        tau = self.tau.double() if isinstance(self.tau, Tensor) else self.tau
        return replace(
            self,
            A=self.A.double(),
            B=self.B.double(),
            magnitude=widen(self.magnitude),
            tau=tau,
            scale=widen(self.scale),
        )


@torch.no_grad()
def evaluate(
    adapter: AnyAdapter, d_in: Mapping[str, int] | None = None, *, factor_builder: FactorBuilder | None = None
) -> list[LayerFactors]:
    """The factors of every layer.

    Args:
        adapter: of any form.
        d_in: columns of each module's weight; needed for a trainable adapter whose output layers are shared, or whose
            factors come from a generator of one's own.
        factor_builder: makes the factors of an adapter that was trained with a custom generator; ignored for other
            adapters.

    Raises:
        AdapterFormatError: a trainable adapter whose shared parts are missing or do not fit, or with a generator that
            is not DoRAN's and no builder for it.
    """
    if isinstance(adapter, FoldedAdapter):
        return [LayerFactors(m.name, m.A, m.B, 1.0, None, 0.0, m.scale, m.kind) for m in adapter.modules.values()]
    if isinstance(adapter, TrainableAdapter):
        return _evaluate_trainable(adapter, d_in, factor_builder)
    return [
        LayerFactors(
            p.name,
            p.A,
            p.B,
            p.scaling,
            p.magnitude,
            0.0,
            torch.ones(p.B.shape[0]) if p.magnitude is None else None,
            p.kind,
        )
        for p in adapter.modules.values()
    ]


def _evaluate_trainable(
    adapter: TrainableAdapter, d_in: Mapping[str, int] | None, factor_builder: FactorBuilder | None
) -> list[LayerFactors]:
    own = own_generator_parts(adapter.config, adapter.modules)
    if own and factor_builder is None:
        raise AdapterFormatError(
            f"its factors come from a generator that is not DoRAN's ({', '.join(own[:5])}): give the function that "
            "builds it (factor_builder, or --factor-builder MODULE:NAME of the doran command), or use the folded form"
        )
    built = build_adapters(adapter.config, adapter.modules, d_in, factor_builder if own else None)
    layers = [layer_factors(name, module, adapter.module_kinds.get(name)) for name, module in built.items()]
    return [part for layer in layers for part in ([layer] if layer.A.dim() == 2 else _experts(layer))]


def _experts(layer: LayerFactors) -> Iterator[LayerFactors]:
    """The matrices of a stack as layers of their own."""
    magnitude, tau = layer.magnitude, layer.tau
    assert magnitude is not None
    for expert, (A, B) in enumerate(zip(layer.A, layer.B, strict=True)):
        own = tau[expert] if isinstance(tau, Tensor) and tau.dim() == 2 else tau
        name = f"{layer.name}[{expert}]"
        yield replace(layer, name=name, A=A, B=B, magnitude=magnitude[expert], tau=own, stack=layer.name, expert=expert)


@torch.no_grad()
def layer_factors(name: str, module: DoranAdapter, kind: Kind | None = None) -> LayerFactors:
    """The record of one live adapter, on the CPU, without masks and noise."""
    with module.inference_mode_of_method():
        A, B = module.factor_pair()
    A, B, magnitude, tau = (tensor.detach().cpu() for tensor in (A, B, read(module.magnitude), module.tau.value()))
    return LayerFactors(name, A, B, module.scaling, magnitude, tau, None, kind)
