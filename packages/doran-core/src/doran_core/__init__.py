"""DoRAN (arXiv 2510.04331) in PyTorch, complete, with torch and safetensors as its only dependencies.

Importing this package does not import torch. The first use of a name does.
"""

from doran_core.support.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(  # the names of __init__.pyi
    __name__,
    distribution="doran-core",
    renamed={"read_compiled": "read_folded", "write_compiled": "write_folded"},
)
