"""The entry point `vllm.general_plugins`: vLLM calls `register` once in every process that it starts."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Patch the installed vLLM to serve DoRA and DoRAN adapters. A second call changes nothing.

    Raises:
        MissingDependencyError: vLLM is not installed.
        DoranError: $DORAN_ADAPTERS_DIR is no directory.
        UnsupportedVllmError: the installed vLLM is too old, or lacks a name that this package builds on.
    """
    from doran_serve import compat, processes, resolver, versions

    versions.check(versions.installed())
    compat.apply()
    resolver.register_resolver()
    processes.end_with_parent()
