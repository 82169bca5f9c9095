"""A server's processes end together: no engine outlives its server, no request its engine. Does not import vLLM."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from doran_serve.vllm_symbols import lookup

__all__ = ["answering_at_shutdown", "end_with_parent"]

_NAMES = ("ApiServer", "EngineCore", "VllmWorker")
"""Names of vLLM's own processes; other children of multiprocessing are ignored."""
_PERIOD = 1.0
_GRACE = 10.0
"""Seconds for a process to end by itself after its parent."""


def end_with_parent() -> None:
    """In a process of vLLM: end when the parent process is gone, for example killed.

    An engine's processes also skip warnings about an adapter's files: admission has given them.
    """
    if multiprocessing.parent_process() is not None and multiprocessing.current_process().name.startswith(_NAMES):
        if not multiprocessing.current_process().name.startswith("ApiServer"):
            logging.getLogger("doran_core").setLevel(logging.ERROR)  # admission has warned, once per version
        threading.Thread(target=_watch, args=(os.getppid(),), name="doran-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PERIOD)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def answering_at_shutdown(stock: Callable[..., None]) -> Callable[..., None]:
    """Around `AsyncLLM.shutdown`: open requests get an error instead of waiting forever."""

    @functools.wraps(stock)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        handler = getattr(self, "output_handler", None)
        stock(self, *args, **kwargs)
        if handler is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and every request with it
                error = lookup("EngineDeadError")()
                handler.get_loop().call_soon_threadsafe(self.output_processor.propagate_error, error)

    return shutdown
