"""Readers and writers at once, two writers, disks that fill up, and processes with next to nothing left."""

from __future__ import annotations

import multiprocessing
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import torch

from doran_core.adapter import FoldedAdapter, read_adapter, write_folded, write_trainable
from doran_core.convert import fold_adapter
from doran_core.diagnostics import inspect_adapter
from doran_core.errors import DoranError
from doran_core.merge import merge_checkpoint

__all__ = ["full_disks", "limits", "readers_and_writers", "two_writers"]


def _numbered(number: int) -> Any:
    """An adapter in whose configuration and tensors one number stands."""
    record, _ = made.trainable_record(made.base_weights(), alpha=float(number), fingerprint=False)
    for parts in record.modules.values():
        parts["magnitude"] = torch.full_like(parts["magnitude"], float(number))
    return record


def _numbered_folded(legal: Path, number: int) -> FoldedAdapter:
    folded = fold_adapter(legal / "static", legal / "base")
    for module in folded.modules.values():
        module.scale.fill_(float(number))
        module.magnitude.fill_(float(number))
        module.B.fill_(float(number))
    return folded


def _numbers(folder: Path) -> set[float]:
    adapter = read_adapter(folder)
    if isinstance(adapter, FoldedAdapter):
        parts = [tensor for module in adapter.modules.values() for tensor in (module.scale, module.magnitude, module.B)]
        return {float(value) for part in parts for value in part.flatten()}
    return {float(parts["magnitude"][0]) for parts in adapter.modules.values()} | {adapter.config.alpha}  # type: ignore[union-attr]


def readers_and_writers(legal: Path, seconds: float) -> dict[str, int]:
    """Two adapters overwritten without pause while they are read, and another program writes beside their files."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="doran-races-") as folder:
        trainable, folded = Path(folder, "trainable"), Path(folder, "folded")
        writes: list[tuple[Path, Callable[[int], Any]]] = [
            (trainable, lambda n: write_trainable(_numbered(n % 50 + 1), trainable, overwrite=True)),
            (folded, lambda n: write_folded(_numbered_folded(legal, n % 50 + 1), folded, overwrite=True)),
        ]
        for _, write in writes:
            write(1)
        stop, written = context.Event(), context.Value("i", 0)
        children = [context.Process(target=_overwrite, args=(write, stop, written)) for _, write in writes]
        queue = context.SimpleQueue()
        children.append(context.Process(target=_write_beside, args=(trainable, stop, queue)))
        for child in children:
            child.start()
        report = {"reads": 0, "mixed": 0, "raised": 0}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for target, _ in writes:
                report["reads"] += 1
                try:
                    report["mixed"] += len(_numbers(target)) != 1
                except Exception:
                    report["raised"] += 1
        stop.set()
        notes = queue.get()
        for child in children:
            child.join(60)
        lost = sum(not (trainable / f"note-{number}").exists() for number in notes)
        hidden = sum(path.name.startswith(".") for path in Path(folder).iterdir())
        return report | {"overwrites": written.value, "notes": len(notes), "lost": lost, "left_over": hidden}


def _overwrite(write: Callable[[int], Any], stop: Any, written: Any) -> None:
    torch.set_num_threads(1)
    number = 1
    while not stop.is_set():
        write(number)
        number += 1
        with written.get_lock():
            written.value += 1


def _write_beside(target: Path, stop: Any, queue: Any) -> None:
    notes: list[int] = []
    while not stop.is_set() and len(notes) < 500:
        time.sleep(0.01)
        try:
            (target / f"note-{len(notes)}").write_text("a note")
        except FileNotFoundError:  # the program hears of it
            continue
        notes.append(len(notes))
    queue.put(notes)


def two_writers(legal: Path, seconds: float) -> dict[str, int]:
    """Four writers of one directory: the last one is there, whole."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="doran-writers-") as folder:
        target, stop, written = Path(folder, "target"), context.Event(), context.Value("i", 0)
        children = [
            context.Process(
                target=_overwrite,
                args=(
                    lambda n, first=first: write_trainable(_numbered(first + n % 9), target, overwrite=True),
                    stop,
                    written,
                ),
            )
            for first in (1, 11, 21, 31)
        ]
        for child in children:
            child.start()
        time.sleep(seconds)
        stop.set()
        for child in children:
            child.join(60)
        raised = sum(child.exitcode != 0 for child in children)
        left = len(list(Path(folder).iterdir())) - 1
        return {"overwrites": written.value, "raised": raised, "mixed": len(_numbers(target)) - 1, "left_over": left}


def _write_numbered(target: Path, first: int, number: int) -> None:
    write_trainable(_numbered(first + number % 9), target, overwrite=True)


def _uses(legal: Path, out: Path) -> dict[str, Callable[[], Any]]:
    record = read_adapter(legal / "generated")
    return {
        "save": lambda: write_trainable(record, out / "saved"),  # type: ignore[arg-type]
        "convert": lambda: write_folded(fold_adapter(legal / "generated", legal / "base"), out / "converted"),
        "merge": lambda: merge_checkpoint(legal / "base", legal / "generated", out / "merged"),
    }


def full_disks(legal: Path) -> dict[str, Any]:
    """Every amount of free space in steps of a page: a whole result or one DoranError, and nothing left."""
    report: dict[str, Any] = {"written": 0, "refused": 0, "raised": 0, "left_over": 0}
    with tempfile.TemporaryDirectory(prefix="doran-disk-") as folder:
        for free in range(0, 96, 4):
            command = ["mount", "-t", "tmpfs", "-o", f"size={max(free, 4)}k", "doran-faults", folder]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return report | {"skipped": "cannot mount a tmpfs here"}
            try:
                if not free:
                    Path(folder, "full").write_bytes(b"x" * 4096)
                before = {path.name for path in Path(folder).iterdir()}
                for use in _uses(legal, Path(folder)).values():
                    try:
                        use()
                        report["written"] += 1
                    except DoranError as error:
                        report["refused"] += 1
                        if "disk is full" not in str(error):
                            report["raised"] += 1
                            print(f"another word for a full disk: {error}")
                    except Exception as error:
                        report["raised"] += 1
                        print(f"a full disk: {error!r}")
                    report["left_over"] += any(path.name.startswith(".") for path in Path(folder).iterdir())
                    for path in Path(folder).iterdir():
                        if path.name not in before:
                            subprocess.run(["rm", "-r", str(path)], check=True)
            finally:
                subprocess.run(["umount", folder], check=True)
    return report


def limits(legal: Path) -> dict[str, int]:
    """Few open files, small files, little memory: a result, one DoranError, or MemoryError; nothing half-written."""
    report = {"done": 0, "refused": 0, "raised": 0, "left_over": 0}
    cases = [(resource.RLIMIT_NOFILE, more) for more in range(8)]
    cases += [(resource.RLIMIT_FSIZE, size) for size in (0, 100, 1000, 4000, 10_000)]
    cases += [(resource.RLIMIT_AS, more * 2**18) for more in (0, 1, 4, 16)]
    context = multiprocessing.get_context("fork")
    for which, amount in cases:
        for name in ("save", "convert", "merge", "inspect"):
            with tempfile.TemporaryDirectory(prefix="doran-limits-") as folder:
                process = context.Process(target=_limited, args=(legal, Path(folder), name, which, amount))
                process.start()
                process.join(60)
                if process.exitcode is None:
                    print(f"{name} with limit {which} of {amount} beyond what it had: no end after 60 s", flush=True)
                    process.kill()
                    process.join()
                verdict = {0: "done", 10: "refused"}.get(process.exitcode, "raised")  # type: ignore[call-overload]
                report[verdict] += 1
                # Without a free descriptor nothing can be removed: the next writer there does it.
                if name in (uses := _uses(legal, Path(folder))) and verdict == "refused":
                    uses[name]()
                report["left_over"] += any(path.name.startswith(".") for path in Path(folder).iterdir())
    return report


def _limited(legal: Path, out: Path, name: str, which: int, amount: int) -> None:
    torch.set_num_threads(1)
    uses = _uses(legal, out) | {"inspect": lambda: inspect_adapter(legal / "generated", legal / "base")}
    _, hard = resource.getrlimit(which)
    if which == resource.RLIMIT_NOFILE:
        amount += len(list(Path("/proc/self/fd").iterdir()))
    elif which == resource.RLIMIT_AS:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        amount += pages * resource.getpagesize()
    resource.setrlimit(which, (amount, hard))
    code = 0
    try:
        uses[name]()
    except (DoranError, MemoryError):
        code = 10
    except BaseException:
        code = 20
    finally:
        resource.setrlimit(which, (hard, hard))
    raise SystemExit(code)
