"""Bytes on disk: the safetensors layout, rows of tensors read and written in place, and atomic directories.

Independent of adapters and models. Imports torch and doran_core.errors only.
"""

import os

__all__ = ["StrPath"]

StrPath = str | os.PathLike[str]
