"""Run studies: stacks of runs, the most telling first, by several processes on one device, within a time budget."""

from __future__ import annotations

import queue
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from experiments.errors import ExperimentError
from experiments.methods import METHODS
from experiments.store import Store
from experiments.study import Run, Study
from experiments.tasks import load_task, prepare, require
from experiments.train import train_runs

__all__ = ["plan", "run_studies"]

_POLL = 0.2
"""Seconds between looks at the workers."""
_SAFETY = 1.3
"""A stack is begun only if this many times its expected seconds are left."""


@dataclass(frozen=True)
class _Progress:
    """Sent by a worker for each stack: an error's text, or what was done."""

    runs: Sequence[Run]
    seconds: float
    error: str | None = None


def plan(studies: Sequence[Study], done: set[str]) -> list[list[Run]]:
    """The runs that are still to do, in stacks, in the order of their value.

    Stacks hold runs of one cohort, seed by seed. One study follows the other; within it all first stacks come before
    all second ones, so that what a budget cuts off is the last seeds of every arm and not the last arms. Trainings of
    whole models come last: they cannot be stacked.
    """
    seen = set(done)
    ranked: list[tuple[tuple[bool, int, int], list[Run]]] = []
    for position, study in enumerate(studies):
        cohorts: dict[Run, list[Run]] = {}
        for _, run in study.runs():
            if run.id not in seen:
                seen.add(run.id)
                cohorts.setdefault(run.cohort(), []).append(run)
        for cohort, runs in cohorts.items():
            whole = METHODS[cohort.method].whole
            width = 1 if whole else study.parallel
            runs.sort(key=lambda run: run.seed)  # stable: rates and fractions keep their order
            ranked += [((whole, position, i // width), runs[i : i + width]) for i in range(0, len(runs), width)]
    return [runs for _, runs in sorted(ranked, key=lambda entry: entry[0])]


def run_studies(
    studies: Sequence[Study],
    folder: Path,
    *,
    workers: int,
    budget: float | None,
    device: str,
    known: set[str],
    data: Path | None = None,
) -> tuple[int, int]:
    """Run what is not in the folder yet.

    Args:
        studies: in the order of their importance.
        folder: the results.
        workers: processes that share the device.
        budget: seconds after which nothing new is begun, and by which what was begun should be done; None for no end.
        device: cpu or cuda.
        known: ids of runs whose results are kept elsewhere, and that are not made again either.
        data: folder of the user's data, for studies that need it.

    Returns:
        How many runs were made, and how many are left.

    Raises:
        ExperimentError: no worker, no such device, or a model whose package is missing.
        RuntimeError: a worker died, or every run that it tried failed; the first traceback is in it.
    """
    started = time.monotonic()
    if workers < 1:
        raise ExperimentError(f"workers: expected 1 or more, got {workers}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ExperimentError(f"device {device}: torch finds no GPU here")
    store = Store(folder)
    stacks = plan(studies, known | set(store.rows()))
    total = sum(map(len, stacks))
    print(f"{total} runs to do in {len(stacks)} stacks, {workers} worker(s) on {device}", flush=True)
    if not stacks:
        return 0, 0
    _prepare(stacks, folder, data)
    context = multiprocessing.get_context("spawn")
    todo, reports = context.Queue(), context.Queue()
    for stack in stacks:
        todo.put(stack)
    for _ in range(workers):
        todo.put(None)
    deadline = None if budget is None else time.time() + budget - (time.monotonic() - started)
    processes = [
        context.Process(target=_work, args=(todo, reports, folder, data, device, deadline, workers))
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    done, errors = _watch(processes, reports, total, started)
    if errors:
        raise RuntimeError(f"{len(errors)} stack(s) failed, {done} runs were made; the first:\n{errors[0]}")
    return done, total - done


def _prepare(stacks: Sequence[Sequence[Run]], folder: Path, data: Path | None) -> None:
    """Refuse what no worker could load, and make once what every worker would otherwise make for itself."""
    models = {run.model for stack in stacks for run in stack}
    for model in sorted(models):
        require(model, data)
    prepare(models, folder / "models")


def _watch(processes: Sequence[Any], reports: Any, total: int, started: float) -> tuple[int, list[str]]:
    done, errors = 0, []
    while True:
        alive = any(process.is_alive() for process in processes)
        try:
            report: _Progress = reports.get(timeout=_POLL)
        except queue.Empty:
            if not alive:
                break
            continue
        first = report.runs[0]
        if report.error is not None:
            errors.append(report.error)
            print(report.error, flush=True)
            continue
        done += len(report.runs)
        print(
            f"{time.monotonic() - started:6.1f} s  {done}/{total}  {first.model} {first.method} {dict(first.options)}: "
            f"{len(report.runs)} runs in {report.seconds:.1f} s",
            flush=True,
        )
    errors += [f"worker {p.pid} ended with exit code {p.exitcode}" for p in processes if p.exitcode]
    return done, errors


def _work(
    todo: Any,
    reports: Any,
    folder: Path,
    data: Path | None,
    device_name: str,
    deadline: float | None,
    workers: int,
) -> None:
    """A worker process: one stack after the other until the queue ends or the time would not suffice."""
    device = torch.device(device_name)
    torch.set_num_threads(max(1, torch.get_num_threads() // workers) if device.type == "cpu" else 2)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    store = Store(folder)
    loaded: dict[str, Any] = {}
    pace: dict[tuple[str, bool], float] = {}
    while (stack := todo.get()) is not None:
        first: Run = stack[0]
        key = first.model, METHODS[first.method].whole
        work = len(stack) * first.steps * first.batch
        if deadline is not None and time.time() + _SAFETY * pace.get(key, 0.0) * work > deadline:
            continue
        started = time.monotonic()
        try:
            if first.model not in loaded:
                task = load_task(first.model, folder / "models", data)
                split = task.split
                on_device = tuple(part.to(device) for part in (split.train, split.validation, split.test))
                loaded[first.model] = task, on_device
            begun = time.monotonic()
            task, on_device = loaded[first.model]
            store.add(train_runs(task, on_device, stack, device))
            pace[key] = (time.monotonic() - begun) / work
            reports.put(_Progress(stack, time.monotonic() - started))
        except Exception:
            reports.put(_Progress(stack, 0.0, f"{first}:\n{traceback.format_exc()}"))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the other workers' stacks need the memory
