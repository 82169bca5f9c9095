"""The memory that adapters take on the device, and the number of slots that fit. No vLLM here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection
from dataclasses import dataclass

from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.errors import DoranError

__all__ = ["Memory", "adaptable", "base_row_bytes", "cpu_cache_gib", "device_memory", "fitting_slots", "slot_bytes"]

_USABLE = 0.9
"""vLLM's default share of the device's memory (--gpu-memory-utilization)."""
_CACHE = 0.2
"""The part of that share for the cache of keys and values."""
_MACHINE = "this machine"


@dataclass(frozen=True)
class Memory:
    """Memory of the engine's device in bytes, and the device's name."""

    total: int
    name: str


def device_memory(ranks: int = 1) -> Memory:
    """Memory of the first visible NVIDIA GPU, times the ranks that share a model; of the machine without a GPU.

    Uses nvidia-smi: CUDA in this process would take device memory and keep vLLM from forking.
    """
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "-i", device, "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        size, _, name = answer.strip().partition(", ")
        return Memory(int(size) * 2**20 * ranks, name if ranks == 1 else f"{ranks} x {name}")
    except (OSError, subprocess.SubprocessError, ValueError):
        return Memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _MACHINE)


def cpu_cache_gib(memory: Memory) -> int | None:
    """GiB for the cache of keys and values where vLLM runs on the CPU: an eighth of the memory, from 1 to 4.

    None on a GPU. On a CPU vLLM's default is 92% of the memory, which is rarely free.
    """
    return max(1, min(4, memory.total // 2**33)) if memory.name == _MACHINE else None


def adaptable(checkpoint: Checkpoint, targets: Collection[str]) -> list[tuple[int, int]]:
    """Shapes `[d_out, d_in]` of the base's weights whose module name ends in one of `targets`."""
    shapes = []
    for key in checkpoint:
        module, _, kind = key.rpartition(".")
        shape = checkpoint.shape(key)
        if kind == "weight" and len(shape) == 2 and module.rpartition(".")[2] in targets:
            shapes.append((shape[0], shape[1]))
    return shapes


def slot_bytes(shapes: Collection[tuple[int, int]], rank: int, width: int) -> int:
    """Bytes of one slot: A and B of `rank` in numbers of `width` bytes for every layer, and the float32 scale."""
    return sum(rank * (d_out + d_in) * width + 4 * d_out for d_out, d_in in shapes)


def base_row_bytes(shapes: Collection[tuple[int, int]], width: int) -> int:
    """Bytes that merged mode keeps: a second copy of the base's adapted weights."""
    return sum(d_out * d_in * width for d_out, d_in in shapes)


def fitting_slots(wanted: int, each: int, base: int, memory: Memory) -> int:
    """The number of slots, at most `wanted`, that fit beside the base and the cache of keys and values.

    Args:
        wanted: requested slots.
        each: bytes of one slot, from `slot_bytes`.
        base: bytes of the base's weights on this device.
        memory: of the device.

    Raises:
        DoranError: not even one slot fits.
    """
    room = _USABLE * (1 - _CACHE) * memory.total - base
    fitting = min(wanted, int(room // max(1, each)))
    if fitting < 1:
        raise DoranError(
            f"no adapter slot fits: the base takes {base / 2**30:.2f} GiB and a slot {each / 2**30:.3f} GiB, of the "
            f"{_USABLE * (1 - _CACHE) * memory.total / 2**30:.2f} GiB of {memory.name} that are not kept for the cache"
        )
    return fitting
