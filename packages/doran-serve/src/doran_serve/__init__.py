"""Serve DoRAN, DoRA, LoRA and base requests in one vLLM batch. Importing this needs neither vLLM nor a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doran_core.support.lazy import lazy_names

if TYPE_CHECKING:
    from doran_serve.plugin import register
    from doran_serve.store import AdapterStore

__all__ = ["AdapterStore", "register"]

if not TYPE_CHECKING:  # to a type checker a module with __getattr__ has every name
    __getattr__, __dir__ = lazy_names(
        __name__, {"AdapterStore": "store", "register": "plugin"}, distribution="doran-serve"
    )
