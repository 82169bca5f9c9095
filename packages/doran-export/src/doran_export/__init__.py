"""Merged DoRAN models to ONNX, proven equal to PyTorch. Importing this imports neither onnxruntime nor a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doran_core.support.lazy import lazy_names

if TYPE_CHECKING:
    from doran_export.api import export, verify
    from doran_export.errors import ExportError, ProofError, UnsupportedModelError
    from doran_export.proof.proof import Proof
    from doran_export.report import ExportReport
    from doran_export.runtime.runner import OnnxRunner

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
    "OnnxRunner": "runtime.runner",
    "Proof": "proof.proof",
    "ProofError": "errors",
    "UnsupportedModelError": "errors",
    "export": "api",
    "verify": "api",
}


if not TYPE_CHECKING:  # to a type checker a module with __getattr__ has every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES, distribution="doran-export")
