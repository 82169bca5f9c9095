"""Serve DoRAN, DoRA, LoRA and base requests in one vLLM batch. Importing this needs neither vLLM nor a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doran_core.support.lazy import lazy_names

if TYPE_CHECKING:
    from doran_serve.live import reload_adapter, reload_adapter_async
    from doran_serve.plugin import register
    from doran_serve.publish import publish_adapter
    from doran_serve.store import AdapterStore

__all__ = ["AdapterStore", "publish_adapter", "register", "reload_adapter", "reload_adapter_async"]

if not TYPE_CHECKING:  # to a type checker a module with __getattr__ has every name
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "AdapterStore": "store",
            "publish_adapter": "publish",
            "register": "plugin",
            "reload_adapter": "live",
            "reload_adapter_async": "live",
        },
        distribution="doran-serve",
    )
