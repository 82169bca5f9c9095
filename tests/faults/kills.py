"""Writers killed at recorded moments: before each of the operations on files by which they write."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from legal import meaning

from doran_core.adapter import read_adapter, write_folded, write_trainable
from doran_core.convert import fold_adapter
from doran_core.errors import DoranError
from doran_core.files.atomic import write_file
from doran_core.merge import merge_checkpoint

__all__ = ["kill_writers"]

Write = Callable[[Path, Path], Any]
"""Called with the legal inputs and the target."""

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


def _run_file(legal: Path, target: Path) -> None:
    """A file of a run directory of `doran train`."""
    target.mkdir(exist_ok=True)
    write_file(target / "metrics.json", '{"loss": 2}')


def _export_directory(legal: Path, target: Path) -> None:
    """The directory of an export, without what fills it: graphs are made before the moments that count here."""
    from doran_core.files.atomic import new_directory

    with new_directory(target) as work:
        shutil.copytree(legal / "base", work / "merged")
        (work / "model.onnx").write_bytes(b"graph" * 1000)
        shutil.rmtree(work / "merged")


WRITERS: dict[str, tuple[Write, str | None]] = {
    "save": (_save, "generated"),
    "convert": (_convert, "folded-static"),
    "merge": (_merge, None),
    "train": (_run_file, None),
    "export": (_export_directory, None),
}
"""Each writer and the legal adapter that it overwrites, if it overwrites one."""


def kill_writers(legal: Path, count: int) -> dict[str, Any]:
    """Kill each writer before operations that a first run recorded, evenly over all of them.

    After each kill the target is absent, the old one or the new one, whole; and the writer, called again, ends with the
    new one and leaves nothing.

    Returns:
        Counts: kills, absent, old, new (after the kill), wrong, left_over; operations by writer.
    """
    report: dict[str, Any] = dict.fromkeys(("kills", "absent", "old", "new", "wrong", "left_over"), 0)
    report["operations"] = {}
    for name, (write, old) in WRITERS.items():
        with tempfile.TemporaryDirectory(prefix="doran-kills-") as folder:
            expected = Path(folder, "expected", "target")
            _prepare(legal, expected, old)
            operations = _run(write, legal, expected, None)
            new, before = _contents(expected), None if old is None else _contents(legal / old)
            report["operations"][name] = operations
            share = count // len(WRITERS) + (name == "merge") * (count % len(WRITERS))
            for number in range(share):
                moment = number * operations // share if share < operations else number % operations
                target = Path(folder, f"{number}", "target")
                _prepare(legal, target, old)
                _run(write, legal, target, moment)
                report["kills"] += 1
                found = _contents(target) if target.exists() else None
                state = "absent" if found in (None, {}) else "old" if found == before else "new"
                wrong = (state == "absent" and old is not None) or (state == "new" and found != new)
                report[state] += 1
                try:
                    write(legal, target)
                except DoranError:  # an export is not written over one that is there
                    wrong = wrong or state != "new"
                report["wrong"] += wrong or _contents(target) != new
                hidden = [path for path in target.parent.rglob("*") if path.name.startswith(".")]
                report["left_over"] += bool(hidden) or [path.name for path in target.parent.iterdir()] != ["target"]
                shutil.rmtree(target.parent)
    return report


def _prepare(legal: Path, target: Path, old: str | None) -> None:
    target.parent.mkdir(parents=True)
    if old is not None:
        shutil.copytree(legal / old, target)


def _contents(folder: Path) -> dict[str, str] | None:
    """An adapter by its meaning, everything else by its bytes."""
    if (folder / "adapter_config.json").exists():
        return {"meaning": meaning(folder)}
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in files}


def _run(write: Write, legal: Path, target: Path, moment: int | None) -> int:
    """Run a writer in a process that kills itself before operation `moment`; without one, count the operations."""
    context = multiprocessing.get_context("fork")
    counted = context.Value("i", 0)
    process = context.Process(target=_child, args=(write, legal, target, moment, counted))
    process.start()
    process.join(120)
    if moment is None and process.exitcode != 0:
        raise RuntimeError(f"the writer ended with {process.exitcode}")
    return int(counted.value)


def _child(write: Write, legal: Path, target: Path, moment: int | None, counted: Any) -> None:
    torch.set_num_threads(1)
    place, writing = str(target.parent), [False]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        # From the first touch of the target's folder on: what is read before writes nothing.
        writing[0] = writing[0] or any(place in os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | Path))
        if not writing[0]:
            return
        if moment is not None and counted.value == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        counted.value += 1

    sys.addaudithook(watch)
    write(legal, target)
