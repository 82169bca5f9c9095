"""What readers take of memory for a large adapter, sound or damaged, in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import tempfile
from pathlib import Path
from typing import Any

import made
import torch
from readers import ADAPTER_READERS

from doran_core import DoranConfig
from doran_core.adapter import FoldedAdapter, TrainableAdapter, write_folded, write_trainable
from doran_core.adapter.schema import FoldedModule
from doran_core.errors import DoranError

__all__ = ["memory"]

_RANK, _WIDTH = 256, 24_576  # 24 MiB a factor
_READERS = ("read", "digest", "publish", "store")
"""Those that read. `inspect` and `merge` compute with what they have read."""


def memory(legal: Path) -> dict[str, Any]:
    """Read adapters of 48 MiB of every form, whole, with a bit flipped and cut off.

    Returns:
        reads; over: those that took more than twice the file's size; largest: times the size that a read took.
    """
    report: dict[str, Any] = {"reads": 0, "over": 0, "largest": 0.0}
    with tempfile.TemporaryDirectory(prefix="doran-memory-") as folder:
        sizes: dict[Path, int] = {}
        for write in (_trainable, _folded, _lora):
            for harm in ("whole", "flipped", "cut"):
                adapter = Path(folder, f"{write.__name__}-{harm}")
                write(adapter)
                file = adapter / "adapter_model.safetensors"
                sizes[adapter] = file.stat().st_size
                _damage(file, sizes[adapter], harm)
        for (name, adapter), grown in _grown(list(sizes), legal).items():
            size = sizes[adapter]
            report["reads"] += 1
            report["largest"] = max(report["largest"], round(grown / size, 2))
            if grown > 2 * size:
                report["over"] += 1
                print(f"{name} of {adapter.name}: {grown >> 20} MiB for a file of {size >> 20} MiB")
    return report


def _factors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "A": torch.randn(_RANK, _WIDTH, generator=generator),
        "B": torch.randn(_WIDTH, _RANK, generator=generator),
    }


def _trainable(target: Path) -> None:
    parts = _factors()
    tensors = {"factors.A": parts["A"], "factors.B": parts["B"], "magnitude": torch.ones(_WIDTH)}
    config = DoranConfig(rank=_RANK, factors="static", tau_kind="zero", target_modules=["q_proj"])
    write_trainable(TrainableAdapter(config, {made.TARGETS[0]: tensors}, task_type="CAUSAL_LM"), target)


def _folded(target: Path) -> None:
    parts = _factors()
    scale = torch.ones(_WIDTH)
    module = FoldedModule(made.TARGETS[0], scale=scale, magnitude=scale, **parts)
    write_folded(FoldedAdapter({module.name: module}), target)


def _lora(target: Path) -> None:
    made.write_peft(target, made.lora_tensors(made.TARGETS[0], _WIDTH, _WIDTH, rank=_RANK), r=_RANK)


def _damage(file: Path, size: int, harm: str) -> None:
    with file.open("r+b") as opened:
        if harm == "flipped":
            opened.seek(size // 2)
            byte = opened.read(1)[0]
            opened.seek(size // 2)
            opened.write(bytes([byte ^ 1]))
        elif harm == "cut":
            opened.truncate(size // 2)


def _grown(adapters: list[Path], legal: Path) -> dict[tuple[str, Path], int]:
    """Bytes by which a process that reads grows at most, by reader and adapter.

    A new process imports everything and forks for each reader. This process has written the adapters: its allocator
    keeps memory that a fork of it would read into, unseen.
    """
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    process = context.Process(target=_fork_readers, args=(adapters, legal, found))
    process.start()
    process.join(600)
    if process.exitcode != 0:
        raise RuntimeError(f"the process of the readers ended with {process.exitcode}")
    return dict(found.get())


def _fork_readers(adapters: list[Path], legal: Path, found: Any) -> None:
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    grown = {}
    for name in _READERS:
        _read_once(name, legal / "static", legal)  # by then all is imported
    for adapter in adapters:
        for name in _READERS:
            of_one = context.SimpleQueue()
            process = context.Process(target=_measure, args=(name, adapter, legal, of_one))
            process.start()
            process.join(120)
            if process.exitcode != 0:
                raise RuntimeError(f"{name} of {adapter.name} ended with {process.exitcode}")
            grown[name, adapter] = of_one.get()
    found.put(grown)


def _measure(name: str, adapter: Path, legal: Path, found: Any) -> None:
    # A fork does not count the pages of shared libraries before it touches them.
    _read_once(name, legal / "static", legal)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _read_once(name, adapter, legal)
    found.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def _read_once(name: str, adapter: Path, legal: Path) -> None:
    with tempfile.TemporaryDirectory() as out, contextlib.suppress(DoranError):
        ADAPTER_READERS[name](adapter, legal, Path(out))
