"""The one place that imports onnxruntime: sessions and the execution providers that this machine really has.

onnxruntime is an extra ([cpu] or [cuda]), so nothing here is imported before a session is needed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from doran_core.errors import ConfigError, require
from doran_export.errors import ExportError

__all__ = ["PROVIDERS", "available_providers", "onnxruntime", "open_session", "provider_names"]

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
"""Providers that this package runs and tests, by the names that users give, best first."""

# Options without TF32: float32 products stay float32.
_OPTIONS: dict[str, dict[str, str]] = {PROVIDERS["cuda"]: {"use_tf32": "0"}, PROVIDERS["cpu"]: {}}


def onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        MissingDependencyError: neither onnxruntime nor onnxruntime-gpu is installed.
    """
    return require("onnxruntime", package="doran-export", extra="cpu", purpose="running an ONNX model")


def available_providers() -> list[str]:
    """Names of the providers that this package knows and this onnxruntime offers, best first."""
    offered = set(onnxruntime().get_available_providers())
    return [name for name in PROVIDERS.values() if name in offered]


def provider_names(names: Sequence[str] | None) -> list[str] | None:
    """onnxruntime's names of providers given by either name, ``cpu`` or ``CPUExecutionProvider``; None stays None."""
    return None if names is None else [PROVIDERS.get(name, name) for name in names]


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
    chosen = provider_names(providers) or available
    for name in chosen:
        if name not in available:
            raise ConfigError(f"execution provider {name!r} is not available: expected some of {', '.join(available)}")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, so do not log them as well
    if threads is not None:
        options.intra_op_num_threads = threads
    if PROVIDERS["cuda"] in chosen:
        _load_cuda(runtime)
    try:
        session = runtime.InferenceSession(str(path), options, providers=[(name, _OPTIONS[name]) for name in chosen])
    except Exception as error:
        raise ExportError(f"onnxruntime {runtime.__version__} cannot load {path}: {str(error).strip()}") from error
    # onnxruntime drops a provider whose libraries do not load, and only logs a line.
    if providers and (lost := [name for name in chosen if name not in session.get_providers()]):
        raise ConfigError(f"onnxruntime {runtime.__version__} has {lost[0]} but could not start it on this machine")
    return session


def _load_cuda(runtime: Any) -> None:
    """Load CUDA's libraries from Python packages, where onnxruntime does not look."""
    if hasattr(runtime, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # it prints missing libraries; the session raises the error later
            runtime.preload_dlls()
