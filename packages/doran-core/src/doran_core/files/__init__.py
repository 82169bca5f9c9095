"""Bytes on disk: the safetensors layout, rows of tensors read and written in place, and atomic directories.

Knows nothing of adapters or models. Imports torch and doran_core.errors only.
"""

import os

__all__ = ["StrPath"]

StrPath = str | os.PathLike[str]
