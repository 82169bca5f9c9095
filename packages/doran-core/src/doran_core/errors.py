"""All of doran's own errors, in one hierarchy.

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
    """The work was done, and its check failed. The request itself was valid."""


class ConfigError(DoranError, ValueError):
    """A configuration field has an invalid value."""


class BackendError(DoranError, ValueError):
    """The requested implementation of the layers is unknown, or cannot run here."""


class AdapterFormatError(DoranError, ValueError):
    """An adapter directory violates the format. Subclasses name the kind of violation."""


class MissingKeyError(AdapterFormatError):
    """A required file, JSON field or tensor is absent."""


class UnexpectedKeyError(AdapterFormatError):
    """A tensor belongs to no part of the adapter."""


class TensorShapeError(AdapterFormatError):
    """A tensor's shape disagrees with its module or the configuration."""


class TensorDtypeError(AdapterFormatError):
    """A tensor has a dtype that an adapter cannot hold (not floating point)."""


class NonFiniteError(AdapterFormatError):
    """A tensor holds NaN or infinity."""


class RankError(AdapterFormatError):
    """The ranks of a pair of factors disagree with each other or with the configuration."""


class CorruptFileError(AdapterFormatError):
    """A file is truncated, is not JSON or safetensors, is a pickle, or does not belong to the file beside it."""


class FormatVersionError(AdapterFormatError):
    """The adapter has a format version that this doran-core does not support."""


class BaseMismatchError(DoranError):
    """The base weights are not the adapter's; the message names both fingerprints."""


class CheckpointError(DoranError):
    """A checkpoint directory cannot be read or written."""


class TargetError(DoranError, ValueError):
    """A target name matches no module, or an unsupported one; the message names the nearest modules."""


class MissingDependencyError(DoranError, ImportError):
    """The request needs an optional package that is not installed."""


def require(module: str, *, package: str, extra: str | None, purpose: str) -> ModuleType:
    """Import an optional module, or say in one sentence what to install.

    Args:
        module: import name, e.g. ``"matplotlib.pyplot"``.
        package: the doran distribution that needs the module, e.g. ``"doran-core"``.
        extra: the extra of `package` that brings the module, or None when it has to be installed by its own name.
        purpose: the task that needs the module, as the start of a sentence, e.g. ``"drawing the plot"``.

    Raises:
        MissingDependencyError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # the module is installed, but one of its own dependencies is missing
        top = module.partition(".")[0]
        install = f"pip install '{package}[{extra}]'" if extra else f"pip install {top}"
        raise MissingDependencyError(f"{purpose} needs {top}, which is not installed: {install}") from error
