"""Loads adapters before the engine's step: if one cannot be loaded, its own requests fail and no others.

vLLM loads an adapter inside the engine's step, where an error ends the engine. This scheduler makes the workers load
the step's adapters first. If an adapter fails, its requests are finished with an error. The step still runs them with
an empty stand-in, and their results are discarded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from doran_serve.vllm_symbols import lookup
from doran_serve.worker import prepare_adapters

if TYPE_CHECKING:

    class StockScheduler:
        """The parts of vLLM's `Scheduler` that `GuardedScheduler` uses."""

        kv_cache_manager: Any
        requests: dict[str, Any]

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def finish_requests(self, request_ids: Any, finished_status: Any) -> Any: ...
        def get_num_unfinished_requests(self) -> int: ...
        def schedule(self, *args: Any, **kwargs: Any) -> Any: ...
        def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, Any]: ...

else:
    StockScheduler = object

__all__ = ["GuardedScheduler", "report_failures", "with_guard"]

_logger = logging.getLogger("vllm.doran_serve")


class GuardedScheduler(StockScheduler):
    """Mixin over vLLM's scheduler. `executor` is set before the first request, see `compat`."""

    executor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loaded: dict[int, str] = {}
        self._failed: list[Any] = []

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's step, after its adapters are loaded."""
        output = super().schedule(*args, **kwargs)
        wanted = {}
        for request_id in output.num_scheduled_tokens:
            adapter = self.requests[request_id].lora_request
            if adapter is not None:
                wanted[adapter.lora_int_id] = adapter
        if any(self._loaded.get(number) != adapter.lora_path for number, adapter in wanted.items()):
            errors = self._prepare(wanted)
            if errors:
                self._fail(output.num_scheduled_tokens, errors)
        return output

    def get_num_unfinished_requests(self) -> int:
        """vLLM's count, plus the failed requests whose error has not been sent."""
        return super().get_num_unfinished_requests() + len(self._failed)

    def forget_loaded(self) -> None:
        """Forget the workers' adapters, because another caller has changed them; the next step asks the workers."""
        self._loaded = {}

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
        """vLLM's outputs, plus an error for each request whose adapter could not be loaded."""
        outputs = super().update_from_output(*args, **kwargs)
        report_failures(outputs, self._failed)
        self._failed = []
        return outputs

    def _prepare(self, wanted: dict[int, Any]) -> dict[int, str]:
        """Load adapters on all workers; return the errors by number."""
        errors: dict[int, str] = {}
        loaded: dict[int, str] | None = None
        for failed, present in self.executor.collective_rpc(prepare_adapters, args=(list(wanted.values()),)):
            errors |= failed
            loaded = present if loaded is None else dict(loaded.items() & present.items())
        self._loaded = {number: path for number, path in (loaded or {}).items() if number not in errors}
        for number, error in errors.items():
            _logger.error("adapter %r cannot be loaded: %s", wanted[number].lora_name, error)
        return errors

    def _fail(self, scheduled: Iterable[str], errors: dict[int, str]) -> None:
        """Finish the scheduled requests of the failed adapters, and drop their cached prefixes."""
        for request_id in list(scheduled):
            request = self.requests[request_id]
            if request.lora_request is None or request.lora_request.lora_int_id not in errors:
                continue
            # The step writes keys and values of the stand-in, which no later request may use as its prefix.
            blocks = self.kv_cache_manager.get_block_ids(request_id)
            self.kv_cache_manager.evict_blocks({block for group in blocks for block in group})
            self.finish_requests(request_id, lookup("RequestStatus").FINISHED_ERROR)
            self._failed.append(request)


def report_failures(outputs: dict[int, Any], failed: Iterable[Any]) -> None:
    """Add an error for each of the `failed` requests to a step's outputs by client."""
    for request in failed:
        failure = lookup("EngineCoreOutput")(
            request_id=request.request_id, new_token_ids=[], finish_reason=request.get_finished_reason()
        )
        if request.client_index not in outputs:
            outputs[request.client_index] = lookup("EngineCoreOutputs")()
        outputs[request.client_index].outputs.append(failure)


def with_guard(stock: type) -> type:
    """A subclass of vLLM's scheduler class `stock` with `GuardedScheduler`."""
    return type(f"Guarded{stock.__name__}", (GuardedScheduler, stock), {"__module__": __name__})
