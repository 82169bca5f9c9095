"""DoRAN (arXiv 2510.04331) in PyTorch, complete, with torch and safetensors as its only dependencies."""

from doran_core import functional
from doran_core.adapt import adapt, load
from doran_core.adapter import read_adapter, read_compiled, write_compiled, write_trainable
from doran_core.config import DoranConfig
from doran_core.errors import DoranError
from doran_core.factors import FactorGenerator, LayerSpec
from doran_core.handle import DoranHandle
from doran_core.layers import DoranAdapter, DoranConv2d, DoranEmbedding, DoranLinear
from doran_core.tau import Tau

__version__ = "0.1.0"

__all__ = [
    "DoranAdapter",
    "DoranConfig",
    "DoranConv2d",
    "DoranEmbedding",
    "DoranError",
    "DoranHandle",
    "DoranLinear",
    "FactorGenerator",
    "LayerSpec",
    "Tau",
    "adapt",
    "functional",
    "load",
    "read_adapter",
    "read_compiled",
    "write_compiled",
    "write_trainable",
]
