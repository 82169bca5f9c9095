"""Merged DoRAN models to ONNX, proven equal to PyTorch. Importing this imports neither onnxruntime nor a model."""

from doran_core.support.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, distribution="doran-export")  # the names of __init__.pyi
