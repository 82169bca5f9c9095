"""Adapters are checked in the process that takes requests, before an engine sees them. Does not import vLLM.

vLLM loads an adapter inside the engine's step, where an error ends the engine for everybody. The check also notices an
adapter whose files were replaced: later requests get it under a name and a number of its own, so that requests in
flight keep the weights that they started with, and cached prefixes are not mixed up.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from doran_core.errors import DoranError
from doran_serve import metrics
from doran_serve.merged.mode import is_merged
from doran_serve.store import AdapterStore
from doran_serve.vllm_symbols import lookup

__all__ = [
    "adapter_id",
    "check_request",
    "checked_add",
    "checked_async_add",
    "current_request",
    "refused_error",
    "unless_merged",
    "with_current_adapter",
]

_first: dict[tuple[str, int], tuple[str, str]] = {}
"""Directory and version that an adapter's name and number first stood for."""


def adapter_id(name: str) -> int:
    """A positive number below 2^31 for a name, the same in every process."""
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % (2**31 - 1)


@functools.cache
def refused_error() -> type[DoranError]:
    """The error for a refused adapter: a DoranError, and one that vLLM's server answers with status 400."""
    bases = (DoranError, lookup("VLLMValidationError"))
    return type("AdapterRefusedError", bases, {"__module__": __name__, "__doc__": "An adapter cannot be served."})


def check_request(vllm_config: Any, lora_request: Any) -> tuple[str, str]:
    """Refuse a request whose adapter the engine could not load; cheap for an adapter that was checked before.

    Returns:
        Directory and version of the adapter.

    Raises:
        AdapterRefusedError: the adapter's directory is not fit to be served; the message says why.
        LoRAAdapterNotFoundError: vLLM's own, if there is no such directory.
    """
    path = lookup("get_adapter_absolute_path")(lora_request.lora_path)
    try:
        store = AdapterStore.for_engine(vllm_config)
        store.require_directory(path, lora_request.lora_name)
        return path, store.check(path).version
    except DoranError as error:
        metrics.refused(lora_request.lora_name)
        raise refused_error()(f"adapter {lora_request.lora_name!r} refused: {error}") from error


def current_request(vllm_config: Any, lora_request: Any) -> Any:
    """The request to send to the engine for an adapter as its files are now.

    Returns:
        `lora_request` itself, while its files are those that its name and number first stood for; else one for the
        same directory under another name and number.

    Raises:
        AdapterRefusedError: as `check_request` does.
        LoRAAdapterNotFoundError: as `check_request` does.
    """
    path, version = now = check_request(vllm_config, lora_request)
    if _first.setdefault((lora_request.lora_name, lora_request.lora_int_id), now) == now:
        if lora_request.load_inplace:  # vLLM would read it again for every request
            return lookup("LoRARequest")(lora_request.lora_name, lora_request.lora_int_id, path)
        return lora_request
    name = f"{lora_request.lora_name}@{version}"
    return lookup("LoRARequest")(name, adapter_id(f"{name} {path}"), path)


def with_current_adapter(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Around `InputProcessor.process_inputs`, which every request passes."""

    @functools.wraps(stock)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("lora_request") is not None:
            adapter = kwargs["lora_request"].lora_name
            kwargs["lora_request"] = current_request(self.vllm_config, kwargs["lora_request"])
            metrics.accepted(adapter)
        return stock(self, *args, **kwargs)

    return process_inputs


def unless_merged(stock: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Around `InputProcessor._validate_lora`, which refuses adapters unless vLLM's own LoRA is on."""

    @functools.wraps(stock)
    def validate(self: Any, lora_request: Any) -> None:
        if lora_request is None or not is_merged(self.vllm_config):
            stock(self, lora_request)

    return validate


def checked_add(stock: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """Around `LLMEngine.add_lora`; in merged mode there is nothing to add."""

    @functools.wraps(stock)
    def add_lora(self: Any, lora_request: Any) -> bool:
        request = current_request(self.vllm_config, lora_request)
        return is_merged(self.vllm_config) or stock(self, request)

    return add_lora


def checked_async_add(stock: Callable[[Any, Any], Awaitable[bool]]) -> Callable[[Any, Any], Awaitable[bool]]:
    """Around `AsyncLLM.add_lora`; the files are read in a thread, so that the server answers meanwhile."""

    @functools.wraps(stock)
    async def add_lora(self: Any, lora_request: Any) -> bool:
        request = await asyncio.to_thread(current_request, self.vllm_config, lora_request)
        return is_merged(self.vllm_config) or await stock(self, request)

    return add_lora
