"""Merged DoRAN models to ONNX, proven equal to PyTorch. Importing this imports neither onnxruntime nor a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doran_export.api import export, verify
    from doran_export.errors import ExportError, ProofError, UnsupportedModelError
    from doran_export.proof import Proof
    from doran_export.report import ExportReport
    from doran_export.runner import OnnxRunner

__all__ = [
    "ExportError",
    "ExportReport",
    "OnnxRunner",
    "Proof",
    "ProofError",
    "UnsupportedModelError",
    "export",
    "verify",
]

_HOMES = {
    "ExportError": "errors",
    "ExportReport": "report",
    "OnnxRunner": "runner",
    "Proof": "proof",
    "ProofError": "errors",
    "UnsupportedModelError": "errors",
    "export": "api",
    "verify": "api",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
