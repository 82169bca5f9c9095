"""Writers killed at recorded moments: before each of the operations on files by which they write."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from legal import meaning
from real import export_contents, export_once, train_contents, train_once

from doran_core.adapter import read_adapter, write_folded, write_trainable
from doran_core.convert import fold_adapter
from doran_core.errors import DoranError
from doran_core.merge import merge_checkpoint

__all__ = ["kill_writers"]

_EVENTS = (
    *("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.chmod", "os.truncate", "os.scandir"),
    *("os.listdir", "shutil.rmtree", "shutil.copyfile", "fcntl.flock", "ctypes.dlsym"),
)
"""Audit events of Python before it touches files; the exchange of two directories shows as ctypes.dlsym."""


def _save(legal: Path, target: Path) -> None:
    write_trainable(read_adapter(legal / "static"), target, overwrite=True)  # type: ignore[arg-type]


def _convert(legal: Path, target: Path) -> None:
    write_folded(fold_adapter(legal / "generated", legal / "base"), target, overwrite=True)


def _merge(legal: Path, target: Path) -> None:
    merge_checkpoint(legal / "base", legal / "generated", target)


def _contents(folder: Path) -> dict[str, str] | None:
    """An adapter by its meaning, everything else by its bytes."""
    if (folder / "adapter_config.json").exists():
        return {"meaning": meaning(folder)}
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in files} or None


@dataclass(frozen=True)
class Writer:
    """A writer, the legal adapter that it overwrites, if it overwrites one, what its output comes to, its share."""

    write: Callable[[Path, Path], Any]
    old: str | None = None
    contents: Callable[[Path], dict[str, str] | None] = _contents
    share: int = 6


WRITERS = {
    "save": Writer(_save, "generated"),
    "convert": Writer(_convert, "folded-static"),
    "merge": Writer(_merge),
    "train": Writer(train_once, contents=train_contents, share=1),
    "export": Writer(export_once, contents=export_contents, share=1),
}
"""`train` and `export` take seconds each."""


def kill_writers(legal: Path, count: int) -> dict[str, Any]:
    """Kill each writer before operations that a first run recorded, evenly over all of them.

    After each kill the target is absent, the old one or the new one, whole; a training's is not done, or done. The
    writer, called again, ends with the new one and leaves nothing.

    Returns:
        Counts: kills, absent, old, new (after the kill), wrong, left_over; operations by writer.
    """
    report: dict[str, Any] = dict.fromkeys(("kills", "absent", "old", "new", "wrong", "left_over"), 0)
    report["operations"] = {}
    shares = {name: count * writer.share // sum(w.share for w in WRITERS.values()) for name, writer in WRITERS.items()}
    shares["merge"] += count - sum(shares.values())
    for name, writer in WRITERS.items():
        with tempfile.TemporaryDirectory(prefix="doran-kills-") as folder:
            expected = Path(folder, "expected", "target")
            _prepare(legal, expected, writer.old)
            operations = _run(writer, legal, expected, None)
            report["operations"][name] = operations
            new, before = writer.contents(expected), None if writer.old is None else writer.contents(legal / writer.old)
            for number in range(shares[name]):
                moment = number * operations // shares[name] if shares[name] < operations else number % operations
                target = Path(folder, f"{number}", "target")
                _prepare(legal, target, writer.old)
                _run(writer, legal, target, moment)
                report["kills"] += 1
                found = writer.contents(target) if target.exists() else None
                state = "absent" if found is None else "old" if found == before else "new"
                wrong = (state == "absent" and writer.old is not None) or (state == "new" and found != new)
                report[state] += 1
                try:
                    writer.write(legal, target)
                except DoranError:  # an export is not written over one that is there
                    wrong = wrong or state != "new"
                wrong = wrong or writer.contents(target) != new
                hidden = [path for path in target.parent.rglob("*") if path.name.startswith(".")]
                left_over = bool(hidden) or [path.name for path in target.parent.iterdir()] != ["target"]
                if wrong or left_over:
                    print(f"{name}, killed before operation {moment} of {operations}: {state}, {wrong=}, {hidden}")
                report["wrong"] += wrong
                report["left_over"] += left_over
                shutil.rmtree(target.parent)
    return report


def _prepare(legal: Path, target: Path, old: str | None) -> None:
    target.parent.mkdir(parents=True)
    if old is not None:
        shutil.copytree(legal / old, target)


def _run(writer: Writer, legal: Path, target: Path, moment: int | None) -> int:
    """Run a writer in a process that kills itself before operation `moment`; without one, count the operations."""
    context = multiprocessing.get_context("fork")
    counted = context.Value("i", 0)
    process = context.Process(target=_child, args=(writer.write, legal, target, moment, counted))
    process.start()
    process.join(600)
    if moment is None and process.exitcode != 0:
        raise RuntimeError(f"the writer ended with {process.exitcode}")
    return int(counted.value)


def _child(write: Any, legal: Path, target: Path, moment: int | None, counted: Any) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    place, writing = str(target.parent), [False]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        paths = [os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | Path)]
        # From the first touch of the target's folder on: what is read before writes nothing, nor does what is read
        # elsewhere. Names in a directory that is held open are relative.
        writing[0] = writing[0] or any(place in path for path in paths)
        if not writing[0] or (paths and all(path.startswith("/") and place not in path for path in paths)):
            return
        if moment is not None and counted.value == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        counted.value += 1

    sys.addaudithook(watch)
    write(legal, target)
