"""Every error that doran raises on purpose: one hierarchy, so that a caller can catch it whole or in part.

A message says what was given, what was expected and where (file, key, module). Imports nothing of doran.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "AdapterFormatError",
    "BackendError",
    "BaseMismatchError",
    "CheckFailedError",
    "CheckpointError",
    "ConfigError",
    "CorruptFileError",
    "DoranError",
    "FormatVersionError",
    "MissingDependencyError",
    "MissingKeyError",
    "NonFiniteError",
    "RankError",
    "TargetError",
    "TensorDtypeError",
    "TensorShapeError",
    "UnexpectedKeyError",
    "require",
]


class DoranError(Exception):
    """Root of doran's own errors. The `doran` command prints these as one sentence and no traceback."""


class CheckFailedError(DoranError):
    """What was asked for was done and checked, and the check does not hold: nothing is wrong with the question."""


class ConfigError(DoranError, ValueError):
    """A configuration field holds a value that it may not hold."""


class BackendError(DoranError, ValueError):
    """An implementation of the layers was asked for by name and is unknown, or cannot run here."""


class AdapterFormatError(DoranError, ValueError):
    """An adapter directory does not hold what its format says. The subclasses say in which way."""


class MissingKeyError(AdapterFormatError):
    """A required file, JSON field or tensor is absent."""


class UnexpectedKeyError(AdapterFormatError):
    """A tensor is there that no part of the adapter explains."""


class TensorShapeError(AdapterFormatError):
    """A tensor has another shape than its module or the configuration gives it."""


class TensorDtypeError(AdapterFormatError):
    """A tensor has a dtype that an adapter cannot hold (not floating point)."""


class NonFiniteError(AdapterFormatError):
    """A tensor holds NaN or infinity."""


class RankError(AdapterFormatError):
    """The rank of a pair of factors disagrees with the configuration or within the pair."""


class CorruptFileError(AdapterFormatError):
    """A file is truncated, is not JSON or safetensors, is a pickle, or does not belong to its sibling."""


class FormatVersionError(AdapterFormatError):
    """The adapter was written in a format that this version of doran does not know."""


class BaseMismatchError(DoranError):
    """The base weights at hand are not those that the adapter was made for; the message names both fingerprints."""


class CheckpointError(DoranError):
    """A checkpoint directory cannot be read or written as asked."""


class TargetError(DoranError, ValueError):
    """No module (or an unsupported one) answers to a target name; the message names the nearest ones."""


class MissingDependencyError(DoranError, ImportError):
    """An optional package is needed for what was asked and is not installed."""


def require(module: str, *, package: str, extra: str | None, purpose: str) -> ModuleType:
    """Import an optional module, or say in one sentence what to install.

    Args:
        module: import name, e.g. ``"matplotlib.pyplot"``.
        package: the doran distribution whose feature asks, e.g. ``"doran-core"``.
        extra: the extra of `package` that brings the module, or None when it has to be installed by its own name.
        purpose: what needs it, as the start of a sentence, e.g. ``"drawing the plot"``.

    Raises:
        MissingDependencyError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # it is installed; something that it needs itself is not
        top = module.partition(".")[0]
        install = f"pip install '{package}[{extra}]'" if extra else f"pip install {top}"
        raise MissingDependencyError(f"{purpose} needs {top}, which is not installed: {install}") from error
