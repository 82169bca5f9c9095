"""Mutated inputs thrown at the readers, in processes that may crash and hang: counted, timed, and kept if they fail."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch
from legal import SEALED, adapters, meaning
from mutate import mutate
from readers import ADAPTER_READERS, BASE_READERS, YAML_READERS

from doran_core.adapter import PeftAdapter, read_adapter
from doran_core.errors import DoranError

__all__ = ["throw"]

LIMIT = 5.0
"""Seconds that a reader may compute, on a machine that others use, too."""

_SILENCE = 30.0
"""Seconds without a word after which a process waits for something, or hears no signal."""


class TookTooLongError(BaseException):
    """Raised in a reader by the clock."""


def throw(legal: Path, count: int, seed: int, seconds: float, failures: Path, workers: int) -> dict[str, Any]:
    """Throw `count` mutated inputs at the readers, or as many as the time allows.

    Returns:
        Counts: inputs, reader calls, accepted, refused, crashes, hangs, errors of another kind, silent wrong results;
        the slowest call in seconds; the growth of memory in MB.
    """
    end = time.monotonic() + seconds
    totals: dict[str, Any] = dict.fromkeys(
        ("inputs", "calls", "accepted", "refused", "crashes", "hangs", "other_errors", "silent"), 0
    ) | {"slowest": 0.0, "memory_mb": 0.0}
    # Of a process that is killed, the folder of its last input stays.
    with tempfile.TemporaryDirectory(prefix="doran-faults-", dir=_memory_disk(), ignore_cleanup_errors=True) as scratch:
        running = [
            _Worker(legal, range(first, count, workers), seed, failures, Path(scratch)) for first in range(workers)
        ]
        while any(worker.alive for worker in running):
            for worker in running:
                worker.listen(totals)
                if time.monotonic() > end:
                    worker.stop()
    return totals


class _Worker:
    """A process that works through its inputs, and another one that goes on where it died."""

    def __init__(self, legal: Path, indices: range, seed: int, failures: Path, scratch: Path) -> None:
        self.legal, self.seed, self.failures, self.scratch = legal, seed, failures, scratch
        self.left = list(indices)
        self.alive = True
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)
        arguments = (self.legal, self.left, self.seed, self.failures, self.scratch, theirs)
        self._process = context.Process(target=_work, args=arguments)
        self._process.start()
        theirs.close()
        self._heard = time.monotonic()

    def listen(self, totals: dict[str, Any]) -> None:
        if not self.alive:
            return
        try:
            while self._pipe.poll(0.02):
                self._take(self._pipe.recv(), totals)
                self._heard = time.monotonic()
        except EOFError:
            self._process.join()
            if self.left:
                self._lost("crashes", f"ended with {self._process.exitcode}", totals)
            else:
                self.alive = False
            return
        if time.monotonic() - self._heard > _SILENCE:
            self._process.kill()
            self._process.join()
            self._lost("hangs", "hears no signal", totals)

    def stop(self) -> None:
        self.left = []
        if self.alive:
            self._process.kill()
            self._process.join()
            self.alive = False

    def _take(self, report: dict[str, Any], totals: dict[str, Any]) -> None:
        self.left.remove(report.pop("index"))
        totals["slowest"] = max(totals["slowest"], report.pop("slowest"))
        totals["memory_mb"] = max(totals["memory_mb"], report.pop("memory_mb"))
        for name, value in report.items():
            totals[name] += value

    def _lost(self, what: str, why: str, totals: dict[str, Any]) -> None:
        index = self.left.pop(0)
        totals[what] += 1
        totals["inputs"] += 1
        _keep(self.failures, self.seed, index, None, {"what": what, "why": why})
        if self.left:
            self._start()
        else:
            self.alive = False


def _work(legal: Path, indices: list[int], seed: int, failures: Path, scratch_root: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(1, 2)
    signal.signal(signal.SIGPROF, _ring)
    meanings = {meaning(folder) for folder in adapters(legal)}
    start = None
    for done, index in enumerate(list(indices)):
        if done == 100:  # by then every package is imported
            start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory(dir=scratch_root) as scratch:
            try:
                report = _one(legal, index, seed, failures, Path(scratch), meanings)
            except Exception:  # the harness' own
                _keep(failures, seed, index, None, {"what": "other_errors", "error": traceback.format_exc()})
                report = {"inputs": 1, "other_errors": 1, "slowest": 0.0}
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send(report | {"index": index, "memory_mb": 0.0 if start is None else (now - start) / 1024})


def _memory_disk() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _ring(*_: object) -> None:
    raise TookTooLongError


def _one(legal: Path, index: int, seed: int, failures: Path, scratch: Path, meanings: set[str]) -> dict[str, Any]:
    random = Random(f"{seed}-{index}")
    share = random.random()
    if share < 0.7:
        choices, readers = adapters(legal), ADAPTER_READERS
    elif share < 0.95:
        choices, readers = sorted(legal.glob("base*")), BASE_READERS
    else:
        choices, readers = [legal / "yaml"], YAML_READERS
    source = random.choice(choices)
    folder = shutil.copytree(source, scratch / "case")
    what = mutate(folder, choices, random)
    names = list(readers)
    chosen = names[:1] + random.sample(names[1:], min(2, len(names) - 1))
    report = dict.fromkeys(("inputs", "calls", "accepted", "refused", "hangs", "other_errors", "silent"), 0)
    report["inputs"], slowest = 1, 0.0
    for name in chosen:
        out = scratch / f"out {name}"
        out.mkdir()
        begin = time.process_time()
        verdict, error = _call(readers[name], folder, legal, out)
        slowest = max(slowest, time.process_time() - begin)
        report["calls"] += 1
        if verdict == "accepted" and name == "read" and source.name in SEALED and _is_wrong(folder, meanings):
            verdict, error = "silent", "another meaning than was saved"
        report[verdict] += 1
        if verdict not in ("accepted", "refused"):
            facts = {"what": verdict, "source": source.name, "mutation": what, "reader": name, "error": error}
            _keep(failures, seed, index, folder, facts)
    return report | {"slowest": slowest}


def _call(reader: Any, folder: Path, legal: Path, out: Path) -> tuple[str, str]:
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        reader(folder, legal, out)
    except DoranError as error:
        return ("refused", "") if str(error) else ("other_errors", "an error without a word")
    except TookTooLongError:
        return "hangs", traceback.format_exc()
    except Exception:
        return "other_errors", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "accepted", ""


def _is_wrong(folder: Path, meanings: set[str]) -> bool:
    """Whether an adapter of a sealed form is accepted as something that nobody saved. PEFT's own form has no seal."""
    return not isinstance(read_adapter(folder), PeftAdapter) and meaning(folder) not in meanings


def _keep(failures: Path, seed: int, index: int, folder: Path | None, facts: dict[str, Any]) -> None:
    """Save what failed, small enough to be looked at and to become a test."""
    place = failures / f"{seed}-{index}-{str(facts.get('reader', 'process')).replace(' ', '-')}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "facts.json").write_text(json.dumps(facts | {"seed": seed, "index": index}, indent=2))
    for path in folder.rglob("*") if folder is not None else ():
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_size < 2**18:
                target = place / "case" / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
