"""Adapter directories without vLLM: forms, the cache, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_specs import FORMS, make_adapter
from safetensors.torch import save_file

from doran_core.checkpoint import binding
from doran_core.checkpoint.fingerprint import fingerprint_weights
from doran_core.errors import (
    AdapterFormatError,
    BaseMismatchError,
    CheckpointError,
    RankError,
    TargetError,
    UnexpectedKeyError,
)
from doran_serve import AdapterStore


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """A checkpoint of two layers in `tmp_path / "base"`, and its weights by module."""
    draw = torch.Generator().manual_seed(6)
    weights = {f"model.layers.{i}.mlp.up_proj": torch.randn(24, 16, generator=draw) for i in range(2)}
    (tmp_path / "base").mkdir()
    save_file({f"{name}.weight": w for name, w in weights.items()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    return weights


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "base", max_rank=16, cache_directory=tmp_path / "cache")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_the_merged_weight(form: str, store: AdapterStore, base: Any, tmp_path: Path) -> None:
    spec = make_adapter(form, base, ("up_proj",), rank=3, seed=1, size=0.4)
    folder = spec.write(tmp_path / form)
    adapter = store.load(folder)
    assert adapter is not None
    assert (adapter.form, adapter.rank, set(adapter.modules)) == (form, 3, set(base))
    for name, module in adapter.modules.items():
        c = 1.0 if module.scale is None else module.scale.double()[:, None]
        weight = c * (base[name].double() + module.B.double() @ module.A.double())
        torch.testing.assert_close(weight, spec.merged(name), rtol=2e-7, atol=2e-7)
    assert (adapter.modules[name].scale is None) == (form == "lora")


@pytest.mark.parametrize("form", ["trainable", "dora"])
def test_folding_happens_once_for_a_content(form: str, store: AdapterStore, base: Any, tmp_path: Path) -> None:
    spec = make_adapter(form, base, ("up_proj",), rank=3, seed=1, size=0.4)
    store.load(spec.write(tmp_path / "one"))
    first = sorted((tmp_path / "cache" / "folded").iterdir())
    AdapterStore(tmp_path / "base", cache_directory=tmp_path / "cache").load(spec.write(tmp_path / "same"))
    assert sorted((tmp_path / "cache" / "folded").iterdir()) == first
    other = make_adapter(form, base, ("up_proj",), rank=3, seed=2, size=0.4)
    store.load(other.write(tmp_path / "one"))
    assert len(list((tmp_path / "cache" / "folded").iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "no scales", "empty", "a pipe"])
def test_a_damaged_cache_is_made_again(damage: str, store: AdapterStore, base: Any, tmp_path: Path) -> None:
    folder = make_adapter("trainable", base, ("up_proj",), rank=3, seed=1, size=0.4).write(tmp_path / "one")
    before = store.load(folder)
    (cached,) = (tmp_path / "cache" / "folded").iterdir()
    file = cached / ("adapter_config.json" if damage == "a pipe" else "adapter_model.safetensors")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "no scales":
        (cached / "doran_scale.safetensors").unlink()
    elif damage == "empty":
        for path in cached.iterdir():
            path.unlink()
    else:
        file.unlink()
        os.mkfifo(file)
    again = AdapterStore(tmp_path / "base", cache_directory=tmp_path / "cache").load(folder)
    assert before is not None
    assert again is not None
    assert all(torch.equal(again.modules[name].B, module.B) for name, module in before.modules.items())
    assert len(list((tmp_path / "cache" / "folded").iterdir())) == 1


def test_a_pipe_in_place_of_an_adapters_file(store: AdapterStore, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    os.mkfifo(tmp_path / "odd" / "adapter_config.json")
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json: is a pipe"):
        store.check(tmp_path / "odd")


def test_checking_again_reads_only_what_changed(
    store: AdapterStore, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    load: Callable[[Path], Any] = store._load
    monkeypatch.setattr(store, "_load", lambda folder: (reads.append(folder), load(folder))[1])
    folder = make_adapter("folded", base, ("up_proj",), rank=3, seed=1, size=0.4).write(tmp_path / "a")
    info = store.check(folder)
    assert (info.form, info.rank, info.modules) == ("folded", 3, 2)
    store.check(folder)
    assert len(reads) == 1
    make_adapter("folded", base, ("up_proj",), rank=5, seed=1, size=0.4).write(folder)
    assert store.check(folder).rank == 5


def test_the_base_is_read_for_the_first_version_of_a_policy_alone(
    store: AdapterStore, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Any] = []
    digest = binding._digest
    monkeypatch.setattr(binding, "_digest", lambda *part: (reads.append(part), digest(*part))[1])
    fingerprint = fingerprint_weights(base.items())

    def version(seed: int, fingerprint: str) -> Path:
        spec = make_adapter("folded", base, ("up_proj",), rank=3, seed=seed, size=0.4)
        folder = spec.write(tmp_path / str(seed))
        spec.write_scales(folder, fingerprint=fingerprint)
        return folder

    for seed in range(3):
        store.check(version(seed, fingerprint))
    assert len(reads) == len(base)
    with pytest.raises(BaseMismatchError, match="sha256:0123"):
        store.check(version(3, "sha256:0123"))


def test_rank_limit(store: AdapterStore, base: Any, tmp_path: Path) -> None:
    folder = make_adapter("lora", base, ("up_proj",), rank=17, seed=1, size=0.4).write(tmp_path / "a")
    with pytest.raises(RankError, match="max_lora_rank=16"):
        store.check(folder)


def test_target_limit(base: dict[str, Any], tmp_path: Path) -> None:
    folder = make_adapter("folded", base, ("up_proj",), rank=3, seed=1, size=0.4).write(tmp_path / "a")
    for allowed in (["up_proj"], ["gate_up_proj"], ["gate_proj"], ["q_proj", "model.layers.0.mlp.up_proj"]):
        store = AdapterStore(tmp_path / "base", targets=allowed)
        if "q_proj" not in allowed:
            assert store.check(folder).modules == 2
            continue
        with pytest.raises(TargetError, match=r"adapts model\.layers\.1\.mlp\.up_proj, .*lora_target_modules=model"):
            store.check(folder)


def test_a_module_that_the_base_lacks(store: AdapterStore, base: Any, tmp_path: Path) -> None:
    other = {"model.layers.9.mlp.up_proj": torch.randn(24, 16)}
    folder = make_adapter("folded", other, ("up_proj",), rank=3, seed=1, size=0.4).write(tmp_path / "a")
    with pytest.raises((CheckpointError, TargetError), match=r"model\.layers\.9\.mlp\.up_proj"):
        store.check(folder)


def test_replaced_base_parameters_cannot_share_a_batch(store: AdapterStore, base: Any, tmp_path: Path) -> None:
    spec = make_adapter("folded", base, ("up_proj",), rank=3, seed=1, size=0.4)
    folder = spec.write(tmp_path / "a")
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.randn(4, 16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    spec.write_scales(folder)
    with pytest.raises(UnexpectedKeyError, match=r"lm_head\.weight.*doran merge"):
        store.check(folder)


def test_without_base_files_a_compiled_adapter_is_enough(base: Any, tmp_path: Path) -> None:
    store = AdapterStore(None, cache_directory=tmp_path / "cache")
    folded = make_adapter("folded", base, ("up_proj",), rank=3, seed=1, size=0.4).write(tmp_path / "a")
    assert store.check(folded).rank == 3
    trainable = make_adapter("trainable", base, ("up_proj",), rank=3, seed=1, size=0.4).write(tmp_path / "b")
    with pytest.raises(CheckpointError, match="needs the base weights"):
        store.check(trainable)


def test_a_damaged_cache_entry_is_made_anew(store: AdapterStore, base: Any, tmp_path: Path) -> None:
    folder = make_adapter("trainable", base, ("up_proj",), rank=3, seed=1, size=0.4).write(tmp_path / "a")
    assert store.load(folder) is not None
    (entry,) = (tmp_path / "cache" / "folded").iterdir()
    (entry / "adapter_model.safetensors").write_bytes(b"damaged")
    adapter = store.load(folder)
    assert adapter is not None
    assert adapter.rank == 3


@pytest.mark.parametrize("form", ["lora", "folded"])
def test_layers_beside_the_language_model(form: str, tmp_path: Path) -> None:
    names = ("model.language_model.layers.0.mlp.up_proj", "model.visual.blocks.0.mlp.fc1", "lm_head")
    base = {name: torch.randn(24 if name == "lm_head" else 20, 16) for name in names}
    tensors = {f"{name}.weight": weight for name, weight in base.items()}
    tensors["model.language_model.embed_tokens.weight"] = torch.randn(24, 16)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = {"architectures": ["None"], "text_config": {"vocab_size": 24}, "vision_config": {}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    store = AdapterStore(tmp_path / "base", cache_directory=tmp_path / "cache")
    folders = {
        name: make_adapter(form, {name: base[name]}, (name,), rank=3, seed=1, size=0.4).write(tmp_path / name)
        for name in names
    }
    assert store.check(folders[names[0]]).others == ()
    with pytest.raises(TargetError, match=r"visual.* serves this layer as another tower"):
        store.check(folders[names[1]])
    if form == "lora":
        assert store.check(folders["lm_head"]).others == ("lm_head",)
    else:
        with pytest.raises(TargetError, match=r"lm_head.* as output head"):
            store.check(folders["lm_head"])
