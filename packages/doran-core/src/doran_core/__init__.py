"""DoRAN (arXiv 2510.04331) in PyTorch, complete, with torch and safetensors as its only dependencies.

Importing this imports no torch: each name does when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from doran_core.support.lazy import lazy_names

if TYPE_CHECKING:
    from doran_core import functional
    from doran_core.adaptation import adapt, load
    from doran_core.adapter import read_adapter, read_folded, write_folded, write_trainable
    from doran_core.errors import DoranError
    from doran_core.handle import DoranHandle
    from doran_core.layers import DoranAdapter, DoranConv2d, DoranEmbedding, DoranLinear
    from doran_core.method.config import DoranConfig
    from doran_core.method.factors import FactorGenerator, LayerSpec
    from doran_core.method.tau import Tau

    __version__: str

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
    "read_folded",
    "write_folded",
    "write_trainable",
]

_HOMES = {
    "DoranAdapter": "layers",
    "DoranConfig": "method.config",
    "DoranConv2d": "layers",
    "DoranEmbedding": "layers",
    "DoranError": "errors",
    "DoranHandle": "handle",
    "DoranLinear": "layers",
    "FactorGenerator": "method.factors",
    "LayerSpec": "method.factors",
    "Tau": "method.tau",
    "adapt": "adaptation",
    "functional": "functional",
    "load": "adaptation",
    "read_adapter": "adapter",
    "read_folded": "adapter",
    "write_folded": "adapter",
    "write_trainable": "adapter",
}

if not TYPE_CHECKING:  # to a type checker a module with __getattr__ has every name
    __getattr__, __dir__ = lazy_names(
        __name__,
        _HOMES,
        distribution="doran-core",
        renamed={"read_compiled": "read_folded", "write_compiled": "write_folded"},
    )
