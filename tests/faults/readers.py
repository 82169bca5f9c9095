"""Every reader of every package, called on a directory. Each returns or raises a DoranError: nothing else."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import torch
from safetensors import safe_open
from torch import nn

from doran_core import load
from doran_core.adapter import read_adapter, write_folded
from doran_core.adapter.digest import directory_digest
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.cli import exit_codes
from doran_core.cli.main import main
from doran_core.convert import fold_adapter
from doran_core.diagnostics import inspect_adapter
from doran_core.errors import DoranError
from doran_core.merge import merge_checkpoint

__all__ = ["ADAPTER_READERS", "BASE_READERS", "YAML_READERS", "warm_up"]

Reader = Callable[[Path, Path, Path], Any]
"""Called with the mutated directory, the folder of the legal inputs, and a folder to write to."""


def warm_up(legal: Path, out: Path) -> None:
    """Every reader on a legal input that it accepts: by then all is imported, before any clock runs."""
    for number, reader in enumerate([*ADAPTER_READERS.values(), *BASE_READERS.values(), *YAML_READERS.values()]):
        base = reader in BASE_READERS.values()
        source = "base" if base else "yaml" if reader in YAML_READERS.values() else "generated"
        (out / str(number)).mkdir()
        with contextlib.suppress(DoranError):  # the configuration's base and texts are not there
            reader(legal / source, legal, out / str(number))
    (out / "lora").mkdir()
    with contextlib.suppress(DoranError):
        _store(legal / "peft-embedding", legal, out / "lora")


class _Root(nn.Module):
    """What PEFT asks of a causal language model."""

    def prepare_inputs_for_generation(self) -> None: ...


def live_model() -> nn.Module:
    """The adapted modules of the made base, live."""
    root = _Root()
    for name, weight in made.base_weights().items():
        if name.endswith("proj.weight"):
            *path, last = name.removesuffix(".weight").split(".")
            parent = root
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]  # type: ignore[assignment]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight = nn.Parameter(weight)
            parent.add_module(last, layer)
    return root


def _merge(adapter: Path, legal: Path, out: Path) -> None:
    _readable(merge_checkpoint(legal / "base", adapter, out / "merged"))


def _merge_into(base: Path, legal: Path, out: Path) -> None:
    _readable(merge_checkpoint(base, legal / "static", out / "merged", dtype=torch.bfloat16))


def _readable(folder: Path) -> None:
    """What was reported as done is what other programs read."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                opened.get_slice(key).get_shape()


def _convert(adapter: Path, legal: Path, out: Path) -> None:
    read_adapter(write_folded(fold_adapter(adapter, legal / "base"), out / "converted"))


def _peft(adapter: Path, legal: Path, out: Path) -> None:
    from peft import PeftModel

    from doran_hf import DoranConfig

    # PEFT opens adapter_config.json itself before it knows whose it is: what is no JSON is PEFT's own error.
    config = DoranConfig.from_pretrained(str(adapter))
    PeftModel.from_pretrained(live_model(), str(adapter), config=config)


def _store(adapter: Path, legal: Path, out: Path) -> None:
    from doran_serve import AdapterStore

    AdapterStore(legal / "base", cache_directory=out / "cache").check(adapter)


def _listed(adapter: Path, legal: Path, out: Path) -> None:
    """`doran serve`'s list of a directory, with leftovers of killed writers beside the adapter."""
    launch = importlib.import_module("doran_serve.launch")
    (out / "adapters").mkdir()
    shutil.copytree(legal / "static", out / "adapters" / ".static.0123abcd.doran-tmp")
    shutil.copytree(legal / "static", out / "adapters" / "good")
    found = launch.find_adapters(out / "adapters")
    assert list(found) == ["good"], found


def _publish(adapter: Path, legal: Path, out: Path) -> None:
    from doran_serve import publish_adapter

    assert directory_digest(publish_adapter(adapter, out / "adapters" / "new")) == directory_digest(adapter)


def _command(*words: str | Path) -> None:
    """The `doran` command: an exit code that means something, or DoranError in place of its message."""
    code = main([str(word) for word in words])
    if code in (exit_codes.CHECK_FAILED, exit_codes.USAGE, exit_codes.SYSTEM):
        raise DoranError(f"exit code {code}")
    assert code == exit_codes.OK, f"exit code {code}: {' '.join(map(str, words))}"


def _export(base: Path, legal: Path, out: Path) -> None:
    from doran_export.loading import open_source

    open_source(base)


def _yaml(folder: Path, legal: Path, out: Path) -> None:
    from doran_hf.train.config import load_config

    load_config(folder / "doran.yaml")


ADAPTER_READERS: dict[str, Reader] = {
    "read": lambda adapter, legal, out: read_adapter(adapter),
    "digest": lambda adapter, legal, out: directory_digest(adapter),
    "inspect": lambda adapter, legal, out: inspect_adapter(adapter),
    "inspect with base": lambda adapter, legal, out: inspect_adapter(adapter, legal / "base"),
    "load": lambda adapter, legal, out: load(live_model(), adapter),
    "merge": _merge,
    "convert": _convert,
    "peft": _peft,
    "store": _store,
    "find_adapters": _listed,
    "publish": _publish,
    "doran inspect": lambda adapter, legal, out: _command("inspect", adapter, "--json"),
    "doran convert": lambda adapter, legal, out: _command(
        *("convert", adapter, "--base", legal / "base", "--to", "folded", "--out", out / "converted")
    ),
}
BASE_READERS: dict[str, Reader] = {
    "checkpoint": lambda base, legal, out: [Checkpoint(base).config()],
    "merge into": _merge_into,
    "convert on": lambda base, legal, out: fold_adapter(legal / "generated", base),
    "inspect on": lambda base, legal, out: inspect_adapter(legal / "peft-lora", base),
    "export": _export,
}
YAML_READERS: dict[str, Reader] = {
    "train configuration": _yaml,
    "doran train": lambda folder, legal, out: _command("train", folder / "doran.yaml", "--dry-run"),
}
