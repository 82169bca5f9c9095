"""Two processes that run functions for the tests, and stay up between tests: imports take seconds.

Gloo joins them, on GPUs NCCL.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from devices import BACKENDS, ON_GPUS, here

__all__ = ["WORLD", "Pair", "RemoteError", "skip_builds"]

WORLD = 2
_START = 600.0
"""Seconds for both processes to import and to meet; on a busy machine the imports alone have taken five minutes."""

_IN_STEP = 30.0
"""Seconds that the second process has to fail like the first."""


class RemoteError(Exception):
    """A process failed; the message is its traceback.

    Attributes:
        kind: name of the exception's class.
    """

    def __init__(self, rank: int, kind: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {trace}")
        self.kind = kind


class Pair:
    """Two processes; ``run(function, *args)`` calls the function in both and returns ``[result of 0, result of 1]``.

    Args:
        timeout: seconds for one call; that the processes start, and import, has a limit of its own.
        preload: modules that both import before they meet. A process that imports one alone, in the middle of a test,
            lets the other wait in a collective.
    """

    def __init__(self, timeout: float = 400.0, preload: Sequence[str] = ("doran_hf",)) -> None:
        self._timeout = timeout
        self._preload = preload
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results by rank.

        Raises:
            RemoteError: one of them raised. The other may wait for it in a collective: unless it raises likewise soon,
                both are started anew.
        """
        if not all(process.is_alive() for process in self._processes):
            self.stop()  # one ended after its answer, as NCCL's watchdog may have it
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._answers(f"{function.__name__}{args}", self._timeout)

    def _answers(self, question: str, timeout: float) -> list[Any]:
        """What both processes send.

        Raises:
            RemoteError: the first failure. Where both failed alike they stay in step, and go on.
            TimeoutError: one said nothing in time.
        """
        results: dict[int, Any] = {}
        failed: dict[int, RemoteError] = {}
        end = time.monotonic() + timeout
        while len(results) + len(failed) < WORLD:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results and rank not in failed]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    kind, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    kind, value = "ProcessDied", "the process ended"
                if kind:
                    failed[rank] = RemoteError(rank, kind, value)
                    end = min(end, time.monotonic() + _IN_STEP)
                else:
                    results[rank] = value
        if len(results) == WORLD:
            return [results[rank] for rank in range(WORLD)]
        kinds = {error.kind for error in failed.values()}
        if len(failed) < WORLD or len(kinds) > 1 or "ProcessDied" in kinds:
            self.stop()
        if failed:
            raise next(iter(failed.values()))
        raise TimeoutError(f"{question}: no answer within {timeout:.0f} s")

    def stop(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="doran-gloo-")
        meeting = f"file://{self._folder.name}/store"  # a port that is free now may be another's when it is used
        for rank in range(WORLD):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, meeting, self._preload, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)
        self._answers("start", _START)


def skip_builds() -> None:
    """Leave DeepSpeed's collectives in shared memory to gloo: DeepSpeed compiles them at the first use.

    The build takes a minute, and a killed one leaves a lock that all later processes wait for.
    """
    import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False


def _serve(rank: int, meeting: str, preload: Sequence[str], pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    if not ON_GPUS:
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
    quiet = os.open(os.devnull, os.O_WRONLY)  # what the libraries say of every step; errors go through the pipe
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import torch

    torch.set_num_threads(1)
    if ON_GPUS:
        torch.cuda.set_device(here())
    for name in preload:
        import_module(name)
    if "deepspeed" in preload:
        skip_builds()
    torch.distributed.init_process_group(
        BACKENDS, init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=_START)
    )
    pipe.send(("", None))
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[str, Any] = "", function(*args)
        except BaseException as error:
            answer = type(error).__name__, traceback.format_exc()
        pipe.send(answer)
