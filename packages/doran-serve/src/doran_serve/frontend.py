"""Adapters are checked in the process that takes requests, before an engine sees them. Does not import vLLM.

vLLM loads an adapter inside the engine's step, where an error ends the engine for everybody.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from doran_core.errors import DoranError
from doran_serve.names import lookup
from doran_serve.store import AdapterStore

__all__ = ["check_request", "checked_add", "checked_async_add", "checked_request", "refused_error"]


@functools.cache
def refused_error() -> type[DoranError]:
    """The error for a refused adapter: a DoranError, and one that vLLM's server answers with status 400."""
    bases = (DoranError, lookup("VLLMValidationError"))
    return type("AdapterRefusedError", bases, {"__module__": __name__, "__doc__": "An adapter cannot be served."})


def check_request(vllm_config: Any, lora_request: Any) -> None:
    """Refuse a request whose adapter the engine could not load; cheap for an adapter that was checked before.

    Raises:
        AdapterRefusedError: the adapter's directory is not fit to be served; the message says why.
        LoRAAdapterNotFoundError: vLLM's own, if there is no such directory.
    """
    path = lookup("get_adapter_absolute_path")(lora_request.lora_path)
    try:
        store = AdapterStore.for_engine(vllm_config)
        store.require_directory(path, lora_request.lora_name)
        store.check(path)
    except DoranError as error:
        raise refused_error()(f"adapter {lora_request.lora_name!r} refused: {error}") from error


def checked_request(stock: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Around `InputProcessor._validate_lora`, which every request passes."""

    @functools.wraps(stock)
    def validate(self: Any, lora_request: Any) -> None:
        stock(self, lora_request)
        if lora_request is not None:
            check_request(self.vllm_config, lora_request)

    return validate


def checked_add(stock: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """Around `LLMEngine.add_lora`."""

    @functools.wraps(stock)
    def add_lora(self: Any, lora_request: Any) -> bool:
        check_request(self.vllm_config, lora_request)
        return stock(self, lora_request)

    return add_lora


def checked_async_add(stock: Callable[[Any, Any], Awaitable[bool]]) -> Callable[[Any, Any], Awaitable[bool]]:
    """Around `AsyncLLM.add_lora`; the files are read in a thread, so that the server answers meanwhile."""

    @functools.wraps(stock)
    async def add_lora(self: Any, lora_request: Any) -> bool:
        await asyncio.to_thread(check_request, self.vllm_config, lora_request)
        return await stock(self, lora_request)

    return add_lora
