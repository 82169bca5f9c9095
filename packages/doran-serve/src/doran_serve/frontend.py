"""Adapters are admitted in the process that takes requests, before an engine sees them. Does not import vLLM.

Admission checks an adapter's files, keeps a private copy by digest, and asks the engine for that version. A replaced
adapter gets a new name and number in the engine. So requests in flight keep the weights that they started with, and
cached prefixes are not mixed up.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from doran_core.errors import DoranError
from doran_serve import metrics
from doran_serve.admission import marked, unmarked
from doran_serve.merged.mode import is_merged
from doran_serve.records import AdapterInfo
from doran_serve.store import AdapterStore, check_mergeable
from doran_serve.vllm_symbols import lookup

__all__ = [
    "EngineNames",
    "adapter_id",
    "admit",
    "admitted_adapter",
    "checked_add",
    "checked_async_add",
    "checked_model",
    "current_request",
    "engine_config",
    "good_ones",
    "refused_error",
    "unless_merged",
    "with_current_adapter",
    "with_known_config",
]

_logger = logging.getLogger("vllm.doran_serve")
_admitted: ContextVar[tuple[Any, Any]] = ContextVar("doran_admitted", default=(None, None))
"""The adapter of this task's HTTP request, and its admitted version."""
_configs: dict[str, Any] = {}
"""vLLM's configuration of each engine of this process, by the name of its model."""


def adapter_id(name: str) -> int:
    """A positive number below 2^31 for a name, the same in every process."""
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % (2**31 - 1)


@functools.cache
def refused_error() -> type[DoranError]:
    """The error for a refused adapter: a DoranError that vLLM's server answers with status 400."""
    bases = (DoranError, lookup("VLLMValidationError"))
    return type("AdapterRefusedError", bases, {"__module__": __name__, "__doc__": "An adapter cannot be served."})


class EngineNames:
    """The engine's name and number for each version of an adapter.

    The first version of a name keeps vLLM's name and number. Every other version, and one whose number is taken, gets
    a name with its digest and a number derived from it. No name or number ever stands for two versions.
    """

    def __init__(self) -> None:
        self._names: dict[str, tuple[int, str]] = {}
        self._numbers: dict[int, tuple[str, str]] = {}

    def __call__(self, name: str, number: int, digest: str) -> tuple[str, int]:
        """The name and number for the version `digest` of the client's adapter `name`."""
        for candidate in (name, f"{name}@{digest[:16]}", f"{name}@{digest}"):
            chosen = number if candidate == name else adapter_id(candidate)
            if (
                self._names.setdefault(candidate, (chosen, digest)) == (chosen, digest)
                and self._numbers.setdefault(chosen, (candidate, digest)) == (candidate, digest)
            ):  # fmt: skip
                return candidate, chosen
        raise refused_error()(f"adapter {name!r}: every name and number for this version stands for another adapter")


_engine_names = EngineNames()


def admit(vllm_config: Any, name: str, path: str) -> AdapterInfo:
    """Check an adapter's files and keep a copy. Cheap if the files have not changed since the last call.

    Args:
        vllm_config: the engine's configuration.
        name: the adapter's, for messages and counters.
        path: its directory.

    Raises:
        AdapterRefusedError: the directory cannot be served; the message says why.
        LoRAAdapterNotFoundError: vLLM's own, if there is no such directory.
    """
    try:
        store = AdapterStore.for_engine(vllm_config)
        store.require_directory(path, name)
        info = store.admit(path)
        if is_merged(vllm_config):
            check_mergeable(info)
        return info
    except DoranError as error:
        metrics.refused(name)
        raise refused_error()(f"adapter {name!r} refused: {error}") from error


def current_request(vllm_config: Any, lora_request: Any) -> Any:
    """The engine's request for the current version of an adapter.

    Raises:
        AdapterRefusedError: as `admit` does.
        LoRAAdapterNotFoundError: as `admit` does.
    """
    if hasattr(lora_request, "lora_tensors"):  # another package's request, with tensors instead of files
        return lora_request
    path, version = unmarked(lora_request.lora_path)
    if version is None:
        path = lookup("get_adapter_absolute_path")(path)
        version = admit(vllm_config, lora_request.lora_name, path).version
    current = copy.copy(lora_request)
    current.lora_name, current.lora_int_id = _engine_names(lora_request.lora_name, lora_request.lora_int_id, version)
    current.lora_path = marked(path, version)
    current.load_inplace = False  # a version never changes, but vLLM would read it again for every request
    return current


def engine_config(model: str) -> Any | None:
    """vLLM's configuration of this process's engine for `model`; None if there is none."""
    return _configs.get(model)


def with_known_config(stock: Callable[..., None]) -> Callable[..., None]:
    """Around `InputProcessor.__init__`: records the engine's limits before its first request."""

    @functools.wraps(stock)
    def initialise(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, vllm_config, *args, **kwargs)
        _configs[vllm_config.model_config.model] = vllm_config

    return initialise


def good_ones(stock: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """Around `OpenAIServingModels.init_static_loras`: a bad adapter does not keep the server from starting."""

    @functools.wraps(stock)
    async def init_static_loras(self: Any) -> None:
        modules = self.static_lora_modules
        for module in modules or ():
            self.static_lora_modules = [module]
            try:
                await stock(self)
            except ValueError as error:
                _logger.error("adapter %r is not served: %s", module.name, error)
        self.static_lora_modules = modules

    return init_static_loras


def checked_model(stock: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    """Around the HTTP server's `_check_model`: a bad adapter is refused before an answer begins to stream.

    The files are read in a thread, so that the server can answer other requests meanwhile.
    """

    @functools.wraps(stock)
    async def check_model(self: Any, request: Any) -> Any:
        answer = await stock(self, request)
        requests = getattr(self.models, "lora_requests", {})
        lora_request = requests.get(request.model) if answer is None else None
        config = engine_config(self.model_config.model)
        if lora_request is not None and config is not None:
            admitted = await asyncio.to_thread(current_request, config, lora_request)
            _admitted.set((lora_request, admitted))
        return answer

    return check_model


def admitted_adapter(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Around the HTTP server's `_maybe_get_adapters`: the version that `checked_model` admitted goes with the request.

    The files may change before the engine gets the request; for a streamed answer the status is then already sent.
    """

    @functools.wraps(stock)
    def maybe_get_adapters(*args: Any, **kwargs: Any) -> Any:
        lora_request = stock(*args, **kwargs)
        checked, admitted = _admitted.get()
        if lora_request is None or checked is not lora_request:
            return lora_request
        pinned = copy.copy(lora_request)  # under the client's name
        pinned.lora_path = admitted.lora_path
        return pinned

    return maybe_get_adapters


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
    """Around `InputProcessor._validate_lora`, which refuses adapters if vLLM's own LoRA is off."""

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
    """Around `AsyncLLM.add_lora`; the files are read in a thread, so that the server can answer meanwhile."""

    @functools.wraps(stock)
    async def add_lora(self: Any, lora_request: Any) -> bool:
        request = await asyncio.to_thread(current_request, self.vllm_config, lora_request)
        return is_merged(self.vllm_config) or await stock(self, request)

    return add_lora
