"""Counters per adapter on vLLM's own `/metrics`, beside its `vllm:lora_requests_info`. Does not import vLLM."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["accepted", "refused"]


@functools.cache
def _counter(name: str, help_text: str) -> Any:
    from prometheus_client import Counter  # vLLM brings it

    return Counter(name, help_text, labelnames=["adapter"])


def accepted(adapter: str) -> None:
    """Count a request for `adapter` that is sent to the engine."""
    _counter("doran:requests", "Requests for an adapter that were sent to the engine.").labels(adapter).inc()


def refused(adapter: str) -> None:
    """Count a refusal of `adapter`."""
    _counter("doran:refusals", "Requests and loads that were refused because of a fault of the adapter.").labels(
        adapter
    ).inc()
