"""Private copies by digest, names of versions, and the resolver, without vLLM."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_specs import make_adapter
from safetensors.torch import save_file

from doran_core.errors import AdapterFormatError, DoranError
from doran_serve import AdapterStore
from doran_serve.admission import AdmittedCopies, content_digest, marked, unmarked
from doran_serve.frontend import EngineNames

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    weights = {NAME: torch.randn(24, 16)}
    (tmp_path / "base").mkdir()
    save_file({f"{NAME}.weight": weights[NAME]}, tmp_path / "base" / "model.safetensors")
    return weights


@pytest.fixture
def store(tmp_path: Path, base: dict[str, Any]) -> AdapterStore:
    return AdapterStore(tmp_path / "base", cache_directory=tmp_path / "cache")


def write(base: dict[str, Any], folder: Path, rank: int, form: str = "folded") -> Path:
    return make_adapter(form, base, ("up_proj",), rank=rank, seed=rank, size=0.4).write(folder)


@pytest.mark.parametrize("form", ["folded", "lora", "dora", "trainable"])
@pytest.mark.parametrize("harm", ["replaced", "removed", "damaged"])
def test_what_was_admitted_is_what_loads(
    form: str, harm: str, store: AdapterStore, base: dict[str, Any], tmp_path: Path
) -> None:
    folder = write(base, tmp_path / "a", 3, form)
    path = marked(folder, store.admit(folder).version)
    shutil.rmtree(folder)
    if harm == "replaced":
        write(base, folder, 5, form)
    if harm == "damaged":
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{")
    adapter, _ = store.load_admitted(path)
    assert adapter is not None
    assert (adapter.rank, adapter.path) == (3, folder)


def test_a_version_that_is_nowhere_is_refused(store: AdapterStore, base: dict[str, Any], tmp_path: Path) -> None:
    folder = write(base, tmp_path / "a", 3)
    path = marked(folder, store.admit(folder).version)
    copy = store.copies.directory / str(unmarked(path)[1])
    (copy / "adapter_model.safetensors").chmod(0o600)
    os.truncate(copy / "adapter_model.safetensors", 10)
    adapter, read_from = store.load_admitted(path)  # damaged copy, sound source: copied again
    assert adapter is not None
    assert read_from == copy
    shutil.rmtree(copy)
    write(base, folder, 4)
    with pytest.raises(AdapterFormatError, match=r"/a: the admitted version .* is gone"):
        store.load_admitted(path)
    # A request that comes now gets what lies there now.
    adapter, _ = store.load_admitted(marked(folder, store.admit(folder).version))
    assert adapter is not None
    assert adapter.rank == 4


def test_a_copy_that_was_removed_is_made_again(store: AdapterStore, base: dict[str, Any], tmp_path: Path) -> None:
    folder = write(base, tmp_path / "a", 3)
    version = store.admit(folder).version
    shutil.rmtree(store.copies.directory)
    assert store.admit(folder).version == version
    assert (store.copies.directory / version).is_dir()


def test_no_room_for_a_copy(store: AdapterStore, base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    folder = write(base, tmp_path / "a", 3)
    adapter, read_from = store.load_admitted(marked(folder, store.admit(folder).version))
    assert adapter is not None
    assert read_from == folder


def test_copies_used_longest_ago_make_room(tmp_path: Path, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = AdmittedCopies(tmp_path / "copies")
    folders = [write(base, tmp_path / str(rank), rank) for rank in (3, 4, 5)]
    old, recent = copies.keep(folders[0]), copies.keep(folders[1])
    leftover = tmp_path / "copies" / ".killed.tmp"
    leftover.mkdir()
    for path in (copies.directory / old, leftover):
        os.utime(path, (time.time() - 3600,) * 2)
    copies.keep(folders[1])
    assert not leftover.exists()
    assert copies.touch(old)
    os.utime(copies.directory / old, (time.time() - 3600,) * 2)
    monkeypatch.setenv("DORAN_ADMITTED_GIB", "0.000001")
    third = copies.keep(folders[2])
    assert [copies.touch(digest) for digest in (old, recent, third)] == [False, True, True]


def test_files_that_change_while_they_are_checked(store: AdapterStore, base: dict[str, Any], tmp_path: Path) -> None:
    folder, stop = tmp_path / "a", threading.Event()
    made = [write(base, tmp_path / f"made-{rank}", rank) for rank in (3, 4)]
    digests = {content_digest(path): rank for path, rank in zip(made, (3, 4), strict=True)}
    shutil.copytree(made[0], folder)

    def change() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            for path in made[turn % 2].iterdir():
                shutil.copyfile(path, folder / path.name)  # one file after the other, in place
            time.sleep(0.05)

    changing = threading.Thread(target=change)
    changing.start()
    admitted = 0
    try:
        for _ in range(8):
            try:
                info = store.admit(folder)
            except DoranError:  # a mixture was seen, and refused
                continue
            assert digests[info.version] == info.rank
            admitted += 1
    finally:
        stop.set()
        changing.join()
    assert store.admit(folder).rank in (3, 4)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_place_of_a_file(file: str, store: AdapterStore, base: dict[str, Any], tmp_path: Path) -> None:
    folder = write(base, tmp_path / "a", 3)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(DoranError, match=file):
        store.admit(folder)


def test_no_name_and_no_number_stands_for_two_versions() -> None:
    names = EngineNames()
    assert names("x", 1, "a" * 64) == ("x", 1)
    second = names("x", 1, "b" * 64)
    assert second[0] == f"x@{'b' * 16}"
    assert names("x", 1, "a" * 64) == ("x", 1)  # rolled back
    assert names("x", 1, "b" * 64) == second
    assert names("y", 1, "c" * 64)[1] != 1  # a number that another adapter has
    assert names("x", 7, "a" * 64)[0] != "x"  # unloaded, and loaded again under another number
    assert names(f"x@{'d' * 16}", 9, "e" * 64) == (f"x@{'d' * 16}", 9)
    assert names("x", 1, "d" * 64)[0] not in ("x", f"x@{'d' * 16}")


NO_ADAPTERS = [
    "..",
    ".",
    "",
    ".hidden",
    "a/b",
    "../a",
    "/etc",
    "x" * 256,
    "x" * 5000,
    "a\0b",
    "\ud800",
    "nobody",
    "pipe",
]


@pytest.mark.parametrize("name", NO_ADAPTERS, ids=range(len(NO_ADAPTERS)))
def test_names_that_are_no_adapters(name: str, base: dict[str, Any], tmp_path: Path) -> None:
    from doran_serve.resolver import DirectoryResolver

    folder = tmp_path / "served"
    write(base, tmp_path, 3)  # what ".." would serve
    write(base, folder / ".hidden", 3)
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "adapter_config.json")
    assert asyncio.run(DirectoryResolver(folder).resolve_lora("base", name)) is None


def test_the_resolver_knows_the_engines_limits(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    from doran_serve import frontend
    from doran_serve.resolver import DirectoryResolver

    monkeypatch.setenv("DORAN_CACHE_DIR", str(tmp_path / "cache"))
    write(base, tmp_path / "served" / "wide", 9)
    model = SimpleNamespace(model=str(tmp_path / "base"), revision=None)
    lora = SimpleNamespace(max_lora_rank=8, target_modules=None)
    config = SimpleNamespace(model_config=model, lora_config=lora, additional_config={})
    monkeypatch.setitem(frontend._configs, model.model, config)
    with pytest.raises(DoranError, match=r"'wide' refused: .*rank 9, but .* max_lora_rank=8"):
        asyncio.run(DirectoryResolver(tmp_path / "served").resolve_lora(model.model, "wide"))
