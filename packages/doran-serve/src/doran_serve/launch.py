"""What `doran serve` does before vLLM: checks every adapter against the base, and derives vLLM's flags from them.

Imports vLLM only to run it, so that `--check` works on a machine without.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from doran_core.adapter.schema import CONFIG_FILE
from doran_core.errors import CheckFailedError, CheckpointError, DoranError
from doran_serve import flags, memory
from doran_serve.base import local_directory
from doran_serve.records import AdapterInfo
from doran_serve.resolver import VARIABLE
from doran_serve.store import AdapterStore

__all__ = ["CACHE_VARIABLE", "Checked", "Plan", "cache_size", "check_adapters", "find_adapters", "plan", "start"]

CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's own: GiB for the cache of keys and values on a CPU."""


def find_adapters(folder: Path) -> dict[str, Path]:
    """Adapter directories below `folder` by name, sorted; `folder` itself if it is one.

    Raises:
        DoranError: there is no such directory, or no adapter in it.
    """
    if not folder.is_dir():
        raise DoranError(f"{folder}: no such directory of adapters")
    if (folder / CONFIG_FILE).exists():
        return {folder.resolve().name: folder}
    found = {path.name: path for path in sorted(folder.iterdir()) if (path / CONFIG_FILE).exists()}
    if not found:
        raise DoranError(f"{folder}: no adapter in it (no subdirectory with {CONFIG_FILE})")
    return found


@dataclass(frozen=True)
class Checked:
    """A directory of adapters that all can be served.

    Attributes:
        paths: by name.
        rank: the largest.
        targets: ends of the module names that they adapt; empty if one is of a kind that only vLLM reads.
        infos: what is known of each.
    """

    paths: dict[str, Path]
    rank: int
    targets: frozenset[str]
    infos: dict[str, AdapterInfo]


def check_adapters(store: AdapterStore, folder: Path) -> Checked:
    """Check every adapter of a directory and print a line on each.

    Raises:
        CheckFailedError: one or more cannot be served; names each with its reason.
    """
    paths, bad, infos = find_adapters(folder), [], dict[str, AdapterInfo]()
    for name, path in paths.items():
        try:
            info = store.check(path)
        except DoranError as error:
            bad.append(f"{name}: {error}")
            print(f"{name:24} REFUSED", flush=True)
        else:
            infos[name] = info
            print(f"{name:24} {_line(info)}", flush=True)
    if bad:
        raise CheckFailedError(f"{len(bad)} of {len(paths)} adapters cannot be served: " + "; ".join(bad))
    known = all(info.targets for info in infos.values())
    targets = frozenset().union(*(info.targets for info in infos.values())) if known else frozenset()
    return Checked(paths, max(info.rank or 1 for info in infos.values()), targets, infos)


def _line(info: AdapterInfo) -> str:
    return f"{info.form:10} rank {info.rank or '?'!s:>4}  {info.modules:4} layers  {info.values / 1e6:8.2f} M values"


@dataclass(frozen=True)
class Plan:
    """A server that can be started.

    Attributes:
        base: as it was given.
        adapters: those that were checked.
        arguments: of `vllm serve`, after the base.
        variables: of the environment.
    """

    base: str
    adapters: Checked | None
    arguments: list[str]
    variables: dict[str, str]


def plan(base: str, adapters: Path | None, mode: str, given: Sequence[str]) -> Plan:
    """Check base and adapters, a printed line on each, and derive what vLLM has to be told.

    Args:
        base: a directory, or a name that vLLM knows.
        adapters: directory of adapters.
        mode: "mixed" or "merged".
        given: the user's own flags for vLLM.

    Raises:
        DoranError: there is no such base, no adapter, one that cannot be served, or flags that do not go together.
    """
    directory = local_directory(base)
    if directory is None and (Path(base).is_absolute() or base.startswith((".", "~"))):
        raise CheckpointError(f"{base}: no such checkpoint directory")
    if adapters is None:
        if mode == "merged":
            raise DoranError("--mode merged needs --adapters")
        return Plan(base, None, list(given), cache_size(flags.names_memory(given)))
    store = AdapterStore(directory)
    checked = check_adapters(store, adapters)
    arguments = _flags(mode, store, checked, given)
    variables = cache_size(flags.names_memory(given))
    if len(checked.paths) > flags.LISTED:
        variables |= {VARIABLE: str(adapters.resolve()), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        print(
            f"{len(checked.paths)} adapters: found by name when a request asks for one. This takes "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, so every client may also use /v1/load_lora_adapter.",
            flush=True,
        )
    return Plan(base, checked, arguments, variables)


def _flags(mode: str, store: AdapterStore, checked: Checked, given: Sequence[str]) -> list[str]:
    """vLLM's flags, and a line on the memory that the adapters will take."""
    shapes, width, base = _base_sizes(store, checked.targets)
    if mode == "merged":
        if shapes:
            kept = memory.base_row_bytes(shapes, width)
            print(f"merged mode keeps {kept / 2**30:.2f} GiB of base weights beside the model", flush=True)
        return flags.merged_flags(checked.paths, given)
    slots = min(len(checked.paths), flags.MOST_SLOTS)
    if shapes and flags.given_value(given, "--max-loras") is None:
        each = memory.slot_bytes(shapes, flags.served_rank(checked.rank), width)
        ranks = int(flags.given_value(given, "--tensor-parallel-size") or flags.given_value(given, "-tp") or 1)
        slots = memory.fitting_slots(slots, each, base, memory.device_memory(ranks))
        print(f"{slots} slots of {each / 2**20:.1f} MiB for {len(checked.paths)} adapters", flush=True)
    return flags.mixed_flags(checked.paths, checked.rank, slots, checked.targets, given)


def cache_size(named: bool) -> dict[str, str]:
    """The variable for the size of the cache on a CPU, and a line on it; nothing on a GPU, or where a size is set.

    Args:
        named: whether the user's arguments for vLLM say how much memory it may take.
    """
    size = memory.cpu_cache_gib(memory.device_memory())
    if size is None or named or CACHE_VARIABLE in os.environ:
        return {}
    print(f"{size} GiB for the cache of keys and values; {CACHE_VARIABLE} sets another size", flush=True)
    return {CACHE_VARIABLE: str(size)}


def _base_sizes(store: AdapterStore, targets: frozenset[str]) -> tuple[list[tuple[int, int]], int, int]:
    """Shapes of the base's adapted weights, bytes of a number, and bytes of the base; nothing if it is not at hand."""
    checkpoint = store.base.checkpoint
    if checkpoint is None or not targets:
        return [], 0, 0
    total = sum(checkpoint.file(key).entry.nbytes for key in checkpoint)
    shapes = memory.adaptable(checkpoint, targets)
    width = max((checkpoint.file(key).entry.nbytes // _count(checkpoint.shape(key)) for key in checkpoint), default=2)
    return shapes, width, total


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return max(1, count)


def start(plan: Plan) -> None:
    """Run vLLM's own server in this process, until it ends.

    Raises:
        DoranError: vLLM is not installed or not one that this package knows, is told not to load the plugin, or its
            engine does not start.
    """
    from doran_serve import compat, versions

    versions.check(versions.installed())
    versions.check_companions()
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "doran" not in allowed.split(","):
        raise DoranError(f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading this plugin; add 'doran' to it or unset it")
    os.environ.update(plan.variables)
    try:
        compat.run_vllm(["serve", plan.base, *plan.arguments])
    except RuntimeError as error:
        if "initialization failed" not in str(error):
            raise
        raise DoranError(f"vLLM's engine did not start; its first line with ERROR says why ({error})") from error
