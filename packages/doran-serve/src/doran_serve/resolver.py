"""Adapters found by name in a directory, when a request first asks for one. Does not import vLLM.

vLLM's server asks its resolvers for a model name that it does not know, if VLLM_ALLOW_RUNTIME_LORA_UPDATING is set. Its
own file resolver takes LoRA only, and numbers adapters by `hash(name)`, which differs between processes.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from doran_core.adapter.schema import CONFIG_FILE
from doran_core.errors import DoranError
from doran_serve.base import local_directory
from doran_serve.frontend import adapter_id, refused_error
from doran_serve.metrics import refused
from doran_serve.store import AdapterStore
from doran_serve.vllm_symbols import lookup

__all__ = ["VARIABLE", "DirectoryResolver", "register_resolver"]

_logger = logging.getLogger("vllm.doran_serve")
VARIABLE = "DORAN_ADAPTERS_DIR"


class DirectoryResolver:
    """Mixin over vLLM's `LoRAResolver`: the adapter called NAME is the subdirectory NAME.

    Args:
        folder: where the adapters are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stores: dict[str, AdapterStore] = {}

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """The request for an adapter by its name, checked; None if there is no such subdirectory.

        Raises:
            AdapterRefusedError: it is there and cannot be served; the server answers 400 with the reason.
        """
        path = self.folder / lora_name
        # A name comes from a client: it may not lead out of the directory.
        if Path(lora_name).name != lora_name or not (path / CONFIG_FILE).is_file():
            return None
        if base_model_name not in self._stores:
            self._stores[base_model_name] = AdapterStore(local_directory(base_model_name))
        try:
            await asyncio.to_thread(self._stores[base_model_name].check, path)
        except DoranError as error:
            refused(lora_name)
            raise refused_error()(f"adapter {lora_name!r} refused: {error}") from error
        return lookup("LoRARequest")(lora_name, adapter_id(lora_name), str(path))


def register_resolver() -> None:
    """Register a resolver for $DORAN_ADAPTERS_DIR with vLLM, if it is set.

    Raises:
        DoranError: it is set to something that is no directory.
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
