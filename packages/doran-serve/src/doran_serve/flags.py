"""vLLM's flags for a directory of adapters; the user's own flags win. Imports no vLLM."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from doran_core.errors import DoranError
from doran_serve.merged.mode import merged_options

__all__ = [
    "HIGHEST_RANK",
    "LISTED",
    "MOST_SLOTS",
    "api_servers",
    "given_value",
    "given_values",
    "merged_flags",
    "mixed_flags",
    "names_memory",
    "served_rank",
]

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of max_lora_rank that vLLM takes (and 1)."""
HIGHEST_RANK = _RANKS[-1]
_STOCK_RANK = 16
"""vLLM's default max_lora_rank, used if the adapters' ranks are unknown."""
MOST_SLOTS = 8
"""Slots reserved by default; each has room for max_lora_rank in every layer. More adapters take turns."""
LISTED = 32
"""Most adapters to name to vLLM at the start; the others are found by name on request."""
_AT_HAND = 32
"""Adapters kept in host memory, so that adapters that take turns are not read again each time."""


def served_rank(rank: int) -> int:
    """The smallest max_lora_rank of vLLM that holds `rank`.

    Raises:
        DoranError: the rank is above vLLM's highest.
    """
    for allowed in _RANKS:
        if rank <= allowed:
            return allowed
    raise DoranError(f"rank {rank} is above {_RANKS[-1]}, the highest that vLLM serves; serve the merged checkpoint")


def given_value(flags: Sequence[str], name: str) -> str | None:
    """The user's value for `name` (``--port``), as ``--port 1`` or ``--port=1``; None without the flag."""
    for index, flag in enumerate(flags):
        key, equals, value = flag.partition("=")
        if key.replace("_", "-") == name:
            if equals:
                return value
            return flags[index + 1] if index + 1 < len(flags) else ""
    return None


def given_values(flags: Sequence[str], name: str) -> list[str]:
    """The user's values for a flag that takes several (``--lora-target-modules``); none without the flag."""
    for index, flag in enumerate(flags):
        key, equals, value = flag.partition("=")
        if key.replace("_", "-") == name:
            values = [value] if equals else []
            values += itertools.takewhile(lambda word: not word.startswith("--"), flags[index + 1 :])
            return values
    return []


def api_servers(flags: Sequence[str]) -> int:
    """Number of vLLM's HTTP servers: one per data-parallel engine, unless the user's flags say otherwise."""
    chosen = (given_value(flags, name) for name in ("--api-server-count", "-asc", "--data-parallel-size", "-dp"))
    return int(next((value for value in chosen if value), "1"))


def names_memory(flags: Sequence[str]) -> bool:
    """Whether the user's flags say how much memory vLLM may take."""
    return any(given_value(flags, name) is not None for name in ("--gpu-memory-utilization", "--kv-cache-memory-bytes"))


def _add(derived: Mapping[str, Sequence[str]], given: Sequence[str]) -> list[str]:
    flags: list[str] = []
    for flag, values in derived.items():
        if given_value(given, flag) is None:
            flags += [flag, *values]
    return [*flags, *given]


def _modules(adapters: Mapping[str, Path]) -> dict[str, list[str]]:
    if not adapters or len(adapters) > LISTED:
        return {}
    # As JSON: vLLM splits NAME=PATH at the first "=" and takes a text with "," for JSON.
    return {
        "--lora-modules": [json.dumps({"name": name, "path": str(path.resolve())}) for name, path in adapters.items()]
    }


def mixed_flags(
    adapters: Mapping[str, Path], rank: int, slots: int, targets: Collection[str], given: Sequence[str]
) -> list[str]:
    """Flags of mixed serving.

    Args:
        adapters: directories by name.
        rank: the adapters' largest rank; 0 if unknown.
        slots: adapters in one batch.
        targets: last parts of the adapted modules' names; empty if unknown. Other layers then get no LoRA.
        given: the user's own flags.
    """
    derived: dict[str, Sequence[str]] = {"--enable-lora": []}
    derived["--max-lora-rank"] = [str(served_rank(rank or _STOCK_RANK))]
    derived["--max-loras"] = [str(slots)]
    slots = int(given_value(given, "--max-loras") or slots)
    derived["--max-cpu-loras"] = [str(max(slots, min(len(adapters), _AT_HAND)))]
    if targets:
        derived["--lora-target-modules"] = sorted(targets)
    return _add({**derived, **_modules(adapters)}, given)


def merged_flags(adapters: Mapping[str, Path], given: Sequence[str]) -> list[str]:
    """Flags of merged mode.

    Args:
        adapters: directories by name.
        given: the user's own flags.

    Raises:
        DoranError: flags that exclude merged mode, or an --additional-config that is no JSON object.
    """
    if given_value(given, "--enable-lora") is not None:
        raise DoranError("--enable-lora does not go with --mode merged, which swaps the weights themselves")
    options: dict[str, object] = {}
    configured = given_value(given, "--additional-config")
    if configured is not None:
        try:
            options = dict(json.loads(configured))
        except (TypeError, ValueError) as error:
            raise DoranError(f"--additional-config {configured!r} is no JSON object") from error
    # The last occurrence of a flag counts.
    return [*_add(_modules(adapters), given), "--additional-config", json.dumps(options | merged_options())]
