"""Schedules requests of one adapter at a time; others wait until the engine has drained and the weights are swapped.

While a request waits, later requests wait behind it, so no adapter starves another. A turn serves all waiting requests
for the oldest request's adapter.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from doran_core.errors import DoranError
from doran_serve.admission import unmarked
from doran_serve.guard import report_failures
from doran_serve.merged.weights import forget_weights, swap_weights
from doran_serve.vllm_symbols import lookup

if TYPE_CHECKING:

    class StockScheduler:
        """The parts of vLLM's `Scheduler` that `SwitchingScheduler` uses."""

        pause_state: Any
        requests: dict[str, Any]

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def add_request(self, request: Any) -> None: ...
        def finish_requests(self, request_ids: Any, finished_status: Any) -> Any: ...
        def get_num_unfinished_requests(self) -> int: ...
        def get_request_counts(self) -> tuple[int, int]: ...
        def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool: ...
        def schedule(self, *args: Any, **kwargs: Any) -> Any: ...
        def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, Any]: ...

else:
    StockScheduler = object

__all__ = ["SwitchingScheduler", "with_switching"]

_logger = logging.getLogger("vllm.doran_serve")

_Version = str | None
"""Directory and digest of a request's adapter, see `admission`; None for the base model."""


class SwitchingScheduler(StockScheduler):
    """Mixin over vLLM's scheduler. `executor` is set before the first use, see `compat`."""

    executor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._active: _Version = None
        self._held: deque[tuple[_Version, Any]] = deque()
        self._failed: list[Any] = []

    def add_request(self, request: Any) -> None:
        """Schedule the request if its adapter is in place and no other request waits; else let it wait.

        In a paused engine every new request waits: a call may take its adapter out of the weights before the engine
        resumes.
        """
        if request.request_id in self.requests:  # the next piece of a streamed input
            super().add_request(request)
            return
        wanted = _wanted(request.lora_request)
        if wanted == self._active and not self._held and not self._paused():
            self._release(request)
        else:
            self._held.append((wanted, request))

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Release waiting requests first, those for another adapter only if the engine has drained."""
        if not self._paused():
            while self._held and (not self.requests or self._held[0][0] == self._active):
                self._switch()
        return super().schedule(*args, **kwargs)

    def get_num_unfinished_requests(self) -> int:
        """vLLM's count, plus the requests that wait for a swap, unless the engine is paused."""
        count = super().get_num_unfinished_requests()
        if self._paused():
            return count
        return count + len(self._held) + len(self._failed)

    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting), including requests that wait for a swap."""
        running, waiting = super().get_request_counts()
        return running, waiting + len(self._held)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: Any) -> Any:
        """vLLM's method, which here also finishes requests that wait for a swap."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        named = None if request_ids is None else set(request_ids)
        kept: deque[tuple[_Version, Any]] = deque()
        for wanted, request in self._held:
            if named is None or request.request_id in named:
                self._release(request)
            else:
                kept.append((wanted, request))
        self._held = kept
        return super().finish_requests(named, finished_status)

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
        """vLLM's outputs, plus an error for each request whose adapter could not be swapped in."""
        outputs = super().update_from_output(*args, **kwargs)
        report_failures(outputs, self._failed)
        self._failed = []
        return outputs

    def restore_base(self, call: str) -> None:
        """Put the base in place, because `call` is about to read or replace its weights.

        Raises:
            DoranError: requests for an adapter are unfinished.
        """
        if self._active is None:
            return
        if self.requests:
            raise DoranError(
                f"{call}: {len(self.requests)} request(s) for {unmarked(self._active)[0]} are unfinished, and merged "
                "mode has this adapter in the weights that the call reads or replaces; let them finish or abort them "
                "first"
            )
        self._put_in_place(None)

    def release_base(self, call: str) -> None:
        """Put the base in place and forget its weights, because `call` is about to replace them.

        Raises:
            DoranError: requests for an adapter are unfinished.
        """
        self.restore_base(call)
        self.executor.collective_rpc(forget_weights)

    def _paused(self) -> bool:
        return bool(self.pause_state != type(self.pause_state).UNPAUSED)

    def _switch(self) -> None:
        """Swap in the oldest waiting request's adapter, and release all requests for it."""
        wanted = self._held[0][0]
        turn = [request for version, request in self._held if version == wanted]
        self._held = deque(entry for entry in self._held if entry[0] != wanted)
        try:
            if wanted != self._active:
                self._put_in_place(wanted)
        except Exception:
            _logger.exception("could not switch to %s: %d requests fail", wanted or "base", len(turn))
            for request in turn:
                self._release(request)
            status = lookup("RequestStatus").FINISHED_ERROR
            super().finish_requests([request.request_id for request in turn], status)
            self._failed += turn
            return
        for request in turn:
            self._release(request)

    def _put_in_place(self, wanted: _Version) -> None:
        start = time.perf_counter()
        # The weights' state is unknown until every worker has answered. The next swap repairs a failed worker.
        self._active = "unknown"
        if not self.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use, so its entries for other weights cannot be dropped")
        self.executor.collective_rpc(swap_weights, args=(wanted,))
        self._active = wanted
        milliseconds = 1e3 * (time.perf_counter() - start)
        _logger.info("switched to %s in %.1f ms", wanted or "the base model", milliseconds)

    def _release(self, request: Any) -> None:
        # The weights already include the adapter, so later code, CUDA graphs above all, must see a plain request.
        request.lora_request = None
        super().add_request(request)


def _wanted(lora_request: Any) -> _Version:
    return None if lora_request is None else str(lora_request.lora_path)


def with_switching(stock: type) -> type:
    """A subclass of vLLM's scheduler class `stock` with `SwitchingScheduler`."""
    return type(f"Switching{stock.__name__}", (SwitchingScheduler, stock), {"__module__": __name__})
