"""What this package raises on purpose, below the root that the `doran` command catches."""

from __future__ import annotations

from doran_core.errors import CheckFailedError, DoranError

__all__ = ["ExportError", "ProofError", "UnsupportedModelError"]


class ExportError(DoranError):
    """The export cannot be made or written as asked."""


class UnsupportedModelError(ExportError):
    """No exporter makes this kind of model as asked; the message names the kind and the known ones."""


class ProofError(ExportError, CheckFailedError):
    """ONNX Runtime and PyTorch disagree by more than the tolerance; the message names the check and the difference."""
