"""`doran serve`: check every adapter against the base, then run vLLM's own server with the right flags.

Imports vLLM only to run it, so that `--check` works on a machine without.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from doran_core.adapter.schema import CONFIG_FILE
from doran_core.errors import CheckpointError, DoranError
from doran_serve.base import local_directory
from doran_serve.store import AdapterInfo, AdapterStore

__all__ = ["find_adapters", "register", "served_rank", "vllm_flags"]

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of max_lora_rank that vLLM takes (and 1)."""
_MOST_SLOTS = 8
"""Slots reserved by default; each has room for max_lora_rank in every layer. Further adapters take turns."""


def register(subparsers: Any) -> None:
    """Add `doran serve` to the `doran` command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        help="serve a base model with many adapters at once through vLLM",
        description="Check every adapter, then run `vllm serve BASE` with them. All further flags go to vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("base", metavar="BASE", help="base model: a directory, or a name that vLLM knows")
    parser.add_argument("--adapters", type=Path, help="directory of adapters, each in a subdirectory that names it")
    parser.add_argument("--mode", choices=["mixed"], default="mixed", help="mixed: adapters and base in one batch")
    parser.add_argument("--check", action="store_true", help="check the adapters and stop")
    _collect_unknown_flags(parser)
    parser.set_defaults(func=_serve)


def _collect_unknown_flags(parser: argparse.ArgumentParser) -> None:
    """Let the parser take flags that it does not know, as `vllm_flags`: they are vLLM's."""
    known = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        parsed, unknown = known(args, namespace)
        parsed.vllm_flags = unknown
        return parsed, []

    parser.parse_known_args = parse_known_args  # type: ignore[assignment, method-assign]


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


def served_rank(rank: int) -> int:
    """The smallest max_lora_rank of vLLM that holds `rank`.

    Raises:
        DoranError: vLLM has none.
    """
    for allowed in _RANKS:
        if rank <= allowed:
            return allowed
    raise DoranError(f"rank {rank} is above {_RANKS[-1]}, the highest that vLLM serves; serve the merged checkpoint")


def vllm_flags(adapters: dict[str, AdapterInfo], given: Sequence[str]) -> list[str]:
    """vLLM's flags for these adapters; what the user gave wins.

    Args:
        adapters: checked, by name.
        given: the user's own flags.
    """
    if not adapters:
        return list(given)
    rank = served_rank(max(info.rank or _RANKS[0] for info in adapters.values()))
    slots = min(len(adapters), _MOST_SLOTS)
    derived = {
        "--max-lora-rank": [str(rank)],
        "--max-loras": [str(slots)],
        "--max-cpu-loras": [str(max(len(adapters), slots))],
        "--lora-modules": [f"{name}={info.path.resolve()}" for name, info in adapters.items()],
    }
    names = {flag.partition("=")[0].replace("_", "-") for flag in given}
    flags = [] if "--enable-lora" in names else ["--enable-lora"]
    for flag, values in derived.items():
        if flag not in names:
            flags += [flag, *values]
    return [*flags, *given]


def _serve(args: argparse.Namespace) -> int:
    directory = local_directory(args.base)
    if directory is None and (Path(args.base).is_absolute() or args.base.startswith((".", "~"))):
        raise CheckpointError(f"{args.base}: no such checkpoint directory")
    adapters = _check(AdapterStore(directory), args.adapters) if args.adapters else {}
    if args.check:
        return 0
    from doran_serve import compat, versions

    versions.check(versions.installed())
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "doran" not in allowed.split(","):
        raise DoranError(f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading this plugin; add 'doran' to it or unset it")
    compat.run_vllm(["serve", args.base, *vllm_flags(adapters, args.vllm_flags)])
    return 0


def _check(store: AdapterStore, folder: Path) -> dict[str, AdapterInfo]:
    """Check every adapter of a directory and print a line on each; refuse them all if one is bad."""
    good: dict[str, AdapterInfo] = {}
    bad: list[str] = []
    for name, path in find_adapters(folder).items():
        try:
            info = good[name] = store.check(path)
        except DoranError as error:
            bad.append(f"{name}: {error}")
            print(f"{name:24} REFUSED", flush=True)
        else:
            print(
                f"{name:24} {info.form:10} rank {info.rank or '?'!s:>4}  {info.modules:4} layers  "
                f"{info.values / 1e6:8.2f} M values",
                flush=True,
            )
    if bad:
        raise DoranError(f"{len(bad)} of {len(good) + len(bad)} adapters cannot be served: " + "; ".join(bad))
    return good
