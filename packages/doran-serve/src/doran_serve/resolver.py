"""Finds adapters by name in a directory, when a request first asks for one. Does not import vLLM.

vLLM's server asks its resolvers for a model name that it does not know, if VLLM_ALLOW_RUNTIME_LORA_UPDATING is set. Its
own file resolver takes LoRA only, and numbers adapters by `hash(name)`, which differs between processes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from pathlib import Path
from typing import Any

from doran_core.adapter.schema import CONFIG_FILE
from doran_core.errors import DoranError
from doran_core.files.opening import is_plain_name
from doran_serve.base import local_directory
from doran_serve.frontend import adapter_id, admit, engine_config, refused_error
from doran_serve.store import AdapterStore
from doran_serve.vllm_symbols import lookup

__all__ = ["CLOSED_VARIABLE", "VARIABLE", "DirectoryResolver", "register_resolver"]

_logger = logging.getLogger("vllm.doran_serve")
VARIABLE = "DORAN_ADAPTERS_DIR"
CLOSED_VARIABLE = "DORAN_CLOSED_ENDPOINTS"
"""If set, clients cannot load adapters by path, even if VLLM_ALLOW_RUNTIME_LORA_UPDATING is on for the resolver."""


class DirectoryResolver:
    """Mixin over vLLM's `LoRAResolver`: the adapter called NAME is the subdirectory NAME.

    Args:
        folder: the directory of the adapters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """The request for an adapter by its name, checked; None if there is no such subdirectory.

        Raises:
            AdapterRefusedError: the adapter exists and cannot be served; the server answers 400 with the reason.
        """
        path = self._find(lora_name)
        if path is None:
            return None
        config = engine_config(base_model_name)
        try:
            if config is not None:
                await asyncio.to_thread(admit, config, lora_name, str(path))
            else:
                store = AdapterStore(local_directory(base_model_name), stacks=True)
                await asyncio.to_thread(store.check, path)
        except DoranError as error:
            raise error if isinstance(error, refused_error()) else refused_error()(f"{lora_name!r}: {error}") from error
        return lookup("LoRARequest")(lora_name, adapter_id(lora_name), str(path))

    def _find(self, name: str) -> Path | None:
        """The adapter's directory; None unless the name is a plain one. Clients choose the name, so check it."""
        if not is_plain_name(name):
            return None
        path = self.folder / name
        try:
            return path if stat.S_ISREG((path / CONFIG_FILE).stat().st_mode) else None
        except (OSError, ValueError):
            return None


def register_resolver() -> None:
    """Register a resolver for $DORAN_ADAPTERS_DIR with vLLM, if the variable is set.

    Raises:
        DoranError: the variable does not name a directory.
    """
    if not (configured := os.environ.get(VARIABLE)):
        return
    folder = Path(configured).resolve()
    if not folder.is_dir():
        raise DoranError(f"{VARIABLE}={configured}: no such directory")
    resolver = type("DoranDirectoryResolver", (DirectoryResolver, lookup("LoRAResolver")), {"__module__": __name__})
    registry = lookup("LoRAResolverRegistry")
    if "doran" not in registry.get_supported_resolvers():
        registry.register_resolver("doran", resolver(folder))
        _logger.info("adapters are looked up by name in %s", folder)
