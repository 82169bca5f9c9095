"""The one place that imports onnxruntime: sessions and the execution providers that this machine really has.

onnxruntime is an extra ([cpu] or [cuda]), so nothing here is imported before a session is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from doran_core.errors import ConfigError, require
from doran_export.errors import ExportError

__all__ = ["available_providers", "onnxruntime", "open_session"]

# Providers that this package runs and tests, best first, each with the options that keep float32 float32.
_PROVIDERS: dict[str, dict[str, str]] = {
    "CUDAExecutionProvider": {"use_tf32": "0"},
    "CPUExecutionProvider": {},
}


def onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        MissingDependencyError: neither onnxruntime nor onnxruntime-gpu is installed.
    """
    return require("onnxruntime", package="doran-export", extra="cpu", purpose="running an ONNX model")


def available_providers() -> list[str]:
    """Names of the providers that this package knows and this onnxruntime offers, best first."""
    offered = set(onnxruntime().get_available_providers())
    return [name for name in _PROVIDERS if name in offered]


def open_session(path: Path, providers: Sequence[str] | None = None, *, threads: int | None = None) -> Any:
    """An onnxruntime.InferenceSession on a file.

    Args:
        path: the ONNX file.
        providers: names of execution providers, best first; None takes the best available one and the CPU.
        threads: threads within one operator; None leaves it to onnxruntime.

    Raises:
        ConfigError: a provider is not available here.
        ExportError: onnxruntime cannot load the file.
        MissingDependencyError: onnxruntime is not installed.
    """
    runtime = onnxruntime()
    available = available_providers()
    chosen = list(providers) if providers is not None else available
    for name in chosen:
        if name not in available:
            raise ConfigError(f"execution provider {name!r} is not available: expected some of {', '.join(available)}")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(str(path), options, providers=[(name, _PROVIDERS[name]) for name in chosen])
    except Exception as error:
        raise ExportError(f"onnxruntime {runtime.__version__} cannot load {path}: {str(error).strip()}") from error
