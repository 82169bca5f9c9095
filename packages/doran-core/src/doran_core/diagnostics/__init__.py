"""Measurements of an adapter as plain data: spectra, effective ranks, tau and norms per layer, similarities."""

from doran_core.diagnostics.factors import delta_similarity, effective_rank, singular_values
from doran_core.diagnostics.gradient import GradientProbe, GradientSplit, ProbedLayer, gradient_split
from doran_core.diagnostics.inspect import AdapterReport, LayerReport, inspect_adapter
from doran_core.diagnostics.similarity import LayerSimilarity, factor_similarity

__all__ = [
    "AdapterReport",
    "GradientProbe",
    "GradientSplit",
    "LayerReport",
    "LayerSimilarity",
    "ProbedLayer",
    "delta_similarity",
    "effective_rank",
    "factor_similarity",
    "gradient_split",
    "inspect_adapter",
    "singular_values",
]
