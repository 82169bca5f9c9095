"""Loads new versions of an adapter into a running engine, as a training loop makes them. Does not import vLLM."""

from __future__ import annotations

import asyncio
import weakref
from pathlib import Path
from typing import Any

from doran_serve.frontend import adapter_id, current_request
from doran_serve.merged.mode import is_merged
from doran_serve.vllm_symbols import lookup

__all__ = ["reload_adapter", "reload_adapter_async"]

_loaded: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def reload_adapter(llm: Any, name: str, directory: str | Path) -> Any:
    """Load the current files of an adapter directory into a running engine, and drop the previous version.

    The base model stays as it is, and no cached prefix of another version is used. Requests in flight keep their
    version.

    Args:
        llm: `vllm.LLM` or vLLM's `LLMEngine`, made with ``enable_lora=True``, or in merged mode.
        name: the adapter's name, the same for all versions.
        directory: an adapter of any form. It may be overwritten or removed once this returns.

    Returns:
        vLLM's LoRARequest for this version, for `generate`.

    Raises:
        AdapterRefusedError: the directory cannot be served; the message says why. The previous version stays.
        LoRAAdapterNotFoundError: vLLM's own, if there is no such directory.
    """
    engine = getattr(llm, "llm_engine", llm)
    request = _request(engine, name, directory)
    engine.add_lora(request)
    last = _replaced(engine, request, name)
    if last is not None:
        engine.remove_lora(last.lora_int_id)
    return request


async def reload_adapter_async(llm: Any, name: str, directory: str | Path) -> Any:
    """`reload_adapter` for vLLM's `AsyncLLM`, with the same errors."""
    request = await asyncio.to_thread(_request, llm, name, directory)
    await llm.add_lora(request)
    last = _replaced(llm, request, name)
    if last is not None:
        await llm.remove_lora(last.lora_int_id)
    return request


def _request(engine: Any, name: str, directory: str | Path) -> Any:
    path = str(Path(directory).resolve())
    request = current_request(engine.vllm_config, lookup("LoRARequest")(name, adapter_id(name), path))
    last = _loaded.get(engine, {}).get(name)
    # Under one name the number depends on the content only: an equal number is the version that is loaded.
    return last if last is not None and last.lora_int_id == request.lora_int_id else request


def _replaced(engine: Any, request: Any, name: str) -> Any | None:
    """Record `request` as the current version of `name`; return the previous one if the engine has another."""
    versions = _loaded.setdefault(engine, {})
    last, versions[name] = versions.get(name), request
    if last is None or last.lora_int_id == request.lora_int_id or is_merged(engine.vllm_config):
        return None
    return last
