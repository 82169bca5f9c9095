"""Similarity of the layers of one kind: cosines between their updates and between their factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from doran_core.adapter.evaluate import LayerFactors
from doran_core.diagnostics.factors import delta_similarity

__all__ = ["LayerSimilarity", "factor_similarity", "layer_similarities"]


@dataclass(frozen=True)
class LayerSimilarity:
    """Cosines between all layers of one projection and size; row and column i belong to ``layers[i]``.

    Attributes:
        projection: last part of the layers' names.
        layers: their names.
        update: cosines of ``B A``.
        A, B: cosines of the factors, which depend on how the rank's directions are ordered and mixed.
    """

    projection: str
    layers: list[str]
    update: list[list[float]]
    A: list[list[float]]
    B: list[list[float]]

    def mean_update(self) -> float:
        """Mean of the cosines between the updates of two different layers."""
        count = len(self.layers)
        return (sum(map(sum, self.update)) - sum(self.update[i][i] for i in range(count))) / (count * (count - 1))


@torch.no_grad()
def factor_similarity(factors: Sequence[Tensor]) -> Tensor:
    """Cosines between factors of one shape, ``[layers, layers]``, float64; 0 where a factor is 0.

    Args:
        factors: A or B of each layer.
    """
    flat = torch.stack([factor.double().flatten() for factor in factors])
    unit: Tensor = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp_min(1e-300)
    return unit @ unit.T


def layer_similarities(layers: Sequence[LayerFactors]) -> list[LayerSimilarity]:
    """The similarities within every projection that has at least two layers of one size and rank.

    If a projection has more than 256 layers, 256 evenly spaced ones are compared, including the first and the last.

    Args:
        layers: evaluated factors, in the order of the rows and columns.
    """
    groups: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[LayerFactors]] = {}
    for layer in layers:
        key = (layer.name.rpartition(".")[2], tuple(layer.A.shape), tuple(layer.B.shape))
        groups.setdefault(key, []).append(layer)
    groups = {key: _some(group) for key, group in groups.items()}
    return [
        LayerSimilarity(
            projection=key[0],
            layers=[layer.name for layer in group],
            update=delta_similarity([(layer.A, layer.B) for layer in group]).tolist(),
            A=factor_similarity([layer.A for layer in group]).tolist(),
            B=factor_similarity([layer.B for layer in group]).tolist(),
        )
        for key, group in groups.items()
        if len(group) > 1
    ]


_MOST = 256
"""Most layers of one projection to compare: time and size of the result grow with the square."""


def _some(layers: list[LayerFactors]) -> list[LayerFactors]:
    if len(layers) <= _MOST:
        return layers
    return [layers[round(number * (len(layers) - 1) / (_MOST - 1))] for number in range(_MOST)]
