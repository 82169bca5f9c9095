"""Adapted layers: views of base layers, the trainable adapter of one layer, and the modules that join the two."""

from typing import TYPE_CHECKING

from doran_core.layers.adapter import DoranAdapter
from doran_core.layers.base import BaseView, base_view
from doran_core.layers.modules import AdaptedLayer, DoranConv, DoranConv2d, DoranEmbedding, DoranLinear, wrap
from doran_core.layers.rebuild import build_adapters
from doran_core.layers.supported import is_adaptable, is_linear
from doran_core.layers.swap import WeightSwap
from doran_core.support.lazy import renamed_names

__all__ = [
    "BaseView",
    "DoranAdapter",
    "DoranConv",
    "DoranConv2d",
    "DoranEmbedding",
    "AdaptedLayer",
    "DoranLinear",
    "WeightSwap",
    "base_view",
    "build_adapters",
    "is_adaptable",
    "is_linear",
    "wrap",
]

if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, {"DoranLayer": "AdaptedLayer"})
