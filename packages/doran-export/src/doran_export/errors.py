"""This package's own errors, all of them DoranErrors, which the `doran` command catches."""

from __future__ import annotations

from doran_core.errors import CheckFailedError, DoranError

__all__ = ["ExportError", "ProofError", "UnsupportedModelError"]


class ExportError(DoranError):
    """The export cannot be made or written."""


class UnsupportedModelError(ExportError):
    """No exporter supports this kind of model with these options; the message names the supported ones."""


class ProofError(ExportError, CheckFailedError):
    """ONNX Runtime and PyTorch disagree by more than the tolerance; the message names the check and the difference."""
