"""The part of `doran serve` before vLLM: checks every adapter against the base, and derives vLLM's flags from them.

Imports vLLM only to run it, so that `--check` works on a machine without vLLM.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from doran_core.adapter.schema import CONFIG_FILE
from doran_core.errors import CheckFailedError, CheckpointError, DoranError
from doran_core.files.opening import is_plain_name
from doran_serve import flags, memory
from doran_serve.base import local_directory
from doran_serve.records import AdapterInfo
from doran_serve.resolver import CLOSED_VARIABLE, VARIABLE
from doran_serve.store import AdapterStore, check_mergeable

__all__ = ["CACHE_VARIABLE", "Checked", "Plan", "cache_size", "check_adapters", "find_adapters", "plan", "start"]

CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's variable: GiB for the cache of keys and values on a CPU."""


def find_adapters(folder: Path) -> dict[str, Path]:
    """Adapter directories in `folder` by name, sorted; or `folder` itself if it is an adapter. Hidden directories are
    skipped.

    Raises:
        DoranError: there is no such directory, or no adapter in it.
    """
    if not folder.is_dir():
        raise DoranError(f"{folder}: no such directory of adapters")
    if (folder / CONFIG_FILE).exists():
        return {folder.resolve().name: folder}
    entries = (path for path in sorted(folder.iterdir()) if is_plain_name(path.name))
    found = {path.name: path for path in entries if (path / CONFIG_FILE).exists()}
    if not found:
        raise DoranError(f"{folder}: no adapter in it (no subdirectory with {CONFIG_FILE})")
    return found


@dataclass(frozen=True)
class Checked:
    """The adapters of a directory that can be served.

    Attributes:
        folder: the directory.
        paths: of the adapters that can be served, by name.
        rank: the largest rank; 0 if none is known.
        targets: last parts of the adapted modules' names; empty if unknown.
        infos: the record of each adapter's check.
        refused: the reason for each adapter that cannot be served, by name.
    """

    folder: Path
    paths: dict[str, Path]
    rank: int
    targets: frozenset[str]
    infos: dict[str, AdapterInfo]
    refused: dict[str, str]

    def require_all(self) -> None:
        """Raise CheckFailedError if adapters cannot be served; names each with its reason."""
        if self.refused:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            count = len(self.refused) + len(self.paths)
            raise CheckFailedError(f"{len(self.refused)} of {count} adapters cannot be served: {reasons}")


def check_adapters(store: AdapterStore, folder: Path, mode: str, reserved: Collection[str]) -> Checked:
    """Check every adapter of a directory, and print one line each.

    Args:
        store: of the base model.
        folder: the directory.
        mode: "mixed" or "merged".
        reserved: the base model's names.

    Raises:
        DoranError: there is no such directory, or no adapter in it.
    """
    infos, refused = dict[str, AdapterInfo](), dict[str, str]()
    paths = find_adapters(folder)
    for name, path in paths.items():
        try:
            if name in reserved:
                raise DoranError(f"{path}: {name!r} is the base model's own name, and requests for it get the base")
            info = store.check(path)
            if mode == "merged":
                check_mergeable(info)
        except DoranError as error:
            refused[name] = str(error)
            print(f"{name:24} REFUSED", flush=True)
        else:
            infos[name] = info
            print(f"{name:24} {_line(info)}", flush=True)
    known = all(info.targets for info in infos.values())
    targets = frozenset().union(*(info.targets for info in infos.values())) if known else frozenset()
    rank = max((info.rank or 0 for info in infos.values()), default=0)
    return Checked(folder, {name: paths[name] for name in infos}, rank, targets, infos, refused)


def _line(info: AdapterInfo) -> str:
    return f"{info.form:10} rank {info.rank or '?'!s:>4}  {info.modules:4} layers  {info.values / 1e6:8.2f} M values"


@dataclass(frozen=True)
class Plan:
    """A server that can be started.

    Attributes:
        base: the base model, as the user gave it.
        adapters: the checked adapters, by name.
        arguments: of `vllm serve`, after the base.
        variables: environment variables.
    """

    base: str
    adapters: Checked | None
    arguments: list[str]
    variables: dict[str, str]


def plan(base: str, adapters: Path | None, mode: str, given: Sequence[str]) -> Plan:
    """Check base and adapters, print one line each, and derive vLLM's flags and variables.

    Args:
        base: a directory, or a name that vLLM knows.
        adapters: directory of adapters.
        mode: "mixed" or "merged".
        given: the user's own flags for vLLM.

    Raises:
        DoranError: there is no such base, no adapter, or flags that do not go together.
    """
    directory = local_directory(base)
    if directory is None and (Path(base).is_absolute() or base.startswith((".", "~"))):
        raise CheckpointError(f"{base}: no such checkpoint directory")
    if adapters is None:
        if mode == "merged":
            raise DoranError("--mode merged needs --adapters")
        return Plan(base, None, list(given), cache_size(flags.names_memory(given)))
    rank = flags.given_value(given, "--max-lora-rank")
    store = AdapterStore(
        directory,
        max_rank=None if mode == "merged" else int(rank or flags.HIGHEST_RANK),
        targets=flags.given_values(given, "--lora-target-modules") or None,
        stacks=mode == "merged",
    )
    if mode == "merged" and store.base.quantized:
        raise DoranError(f"{base}: --mode merged writes adapted weights in place, which a quantized base cannot hold")
    checked = check_adapters(store, adapters, mode, flags.given_values(given, "--served-model-name") or [base])
    arguments = _flags(mode, store, checked, given)
    return Plan(base, checked, arguments, cache_size(flags.names_memory(given)) | _by_name(checked, given))


def _by_name(checked: Checked, given: Sequence[str]) -> dict[str, str]:
    """Environment variables with which vLLM finds the directory's adapters by name on request."""
    if (checked.folder / CONFIG_FILE).exists():  # a single adapter
        return {}
    if flags.api_servers(given) > 1:  # vLLM refuses the resolver there
        print(f"adapters that are put into {checked.folder} from now on are served after a restart", flush=True)
        if len(checked.paths) > flags.LISTED:
            raise DoranError(
                f"{len(checked.paths)} adapters, of which up to {flags.LISTED} are named to vLLM; the others are found "
                "by name, which vLLM does in one HTTP server only: add --api-server-count 1"
            )
        return {}
    folder = os.environ.get(VARIABLE) or str(checked.folder.resolve())
    print(f"adapters that are put into {folder} from now on are found by name", flush=True)
    variables = {VARIABLE: folder}
    if "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in os.environ:  # if set, the user wants clients to load adapters
        variables |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", CLOSED_VARIABLE: "1"}
    return variables


def _flags(mode: str, store: AdapterStore, checked: Checked, given: Sequence[str]) -> list[str]:
    """vLLM's flags, and a line about the adapters' memory."""
    shapes, width, base = _base_sizes(store, checked.targets)
    if mode == "merged":
        if shapes:
            kept = memory.base_row_bytes(shapes, width)
            has_experts = any(info.stacks for info in checked.infos.values())
            experts = ", and of the experts that adapters change" if has_experts else ""
            print(f"merged mode keeps {kept / 2**30:.2f} GiB of base weights beside the model{experts}", flush=True)
        return flags.merged_flags(checked.paths, given)
    slots = min(max(1, len(checked.paths)), flags.MOST_SLOTS)
    if shapes and flags.given_value(given, "--max-loras") is None:
        each = memory.slot_bytes(shapes, flags.served_rank(checked.rank or 1), width)
        ranks = int(flags.given_value(given, "--tensor-parallel-size") or flags.given_value(given, "-tp") or 1)
        slots = memory.fitting_slots(slots, each, base, memory.device_memory(ranks))
        print(f"{slots} slots of {each / 2**20:.1f} MiB for {len(checked.paths)} adapters", flush=True)
    return flags.mixed_flags(checked.paths, checked.rank, slots, checked.targets, given)


def cache_size(named: bool) -> dict[str, str]:
    """The variable for the cache size on a CPU, and a line about it; empty on a GPU, or if a size is set.

    Args:
        named: whether the user's flags set vLLM's memory.
    """
    size = memory.cpu_cache_gib(memory.device_memory())
    if size is None or named or CACHE_VARIABLE in os.environ:
        return {}
    print(f"{size} GiB for the cache of keys and values; {CACHE_VARIABLE} sets another size", flush=True)
    return {CACHE_VARIABLE: str(size)}


def _base_sizes(store: AdapterStore, targets: frozenset[str]) -> tuple[list[tuple[int, int]], int, int]:
    """Shapes of the base's adapted weights, bytes per number, and bytes of the base; empty without local files."""
    checkpoint = store.base.checkpoint
    if checkpoint is None or not targets:
        return [], 0, 0
    total = sum(checkpoint.file(key).entry.nbytes for key in checkpoint)
    shapes = memory.adaptable(checkpoint, targets)
    counts = {key: max(1, math.prod(checkpoint.shape(key))) for key in checkpoint}
    width = max((checkpoint.file(key).entry.nbytes // count for key, count in counts.items()), default=2)
    return shapes, width, total


def start(plan: Plan) -> None:
    """Run vLLM's own server in this process, until it ends.

    Raises:
        DoranError: vLLM is not installed or too old, VLLM_PLUGINS excludes this plugin, or the engine does not start.
    """
    from doran_serve import compat, versions

    for name, reason in (plan.adapters.refused if plan.adapters else {}).items():
        print(f"doran: not served: {name}: {reason}", file=sys.stderr, flush=True)
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
