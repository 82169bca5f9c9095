"""Adapters of a language tower: found by the names in the checkpoint, served by a real vLLM; other towers refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from adapter_specs import FORMS, make_adapter
from test_mixed import ALL, ask_elsewhere, prompts_of
from torch import nn
from towers import TOWERS, own_mapper
from walk import ask_vllm

from doran_core.adapter import FoldedAdapter, FoldedModule
from doran_core.errors import BaseMismatchError, DoranError
from doran_core.merge import merge_checkpoint
from doran_serve import AdapterStore
from doran_serve.base import BaseModel
from doran_serve.layer_map import place_name, renamer
from doran_serve.records import ServedModule
from doran_serve.vllm_symbols import lookup


def need(kind: str) -> None:
    missing = TOWERS[kind].needs
    if missing and importlib.util.find_spec(missing) is None:
        pytest.skip(f"vLLM's {TOWERS[kind].module} imports {missing}, which has no build for this torch")


def record(names: list[str], stored: dict[str, str] | None = None) -> FoldedAdapter:
    one = torch.ones(1)
    return FoldedAdapter(
        {name: FoldedModule(name, torch.ones(1, 1), torch.ones(1, 1), one, one) for name in names}, stored_names=stored
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", TOWERS)
def test_a_running_engine_answers_as_one_of_the_merged_checkpoint(
    kind: str, checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    """Mixed and merged mode, prompts of text alone; what `doran merge` writes is the oracle, in vLLM, too."""
    need(kind)
    spec = make_adapter("trainable", reference(kind).weights, ALL, rank=4, seed=3, size=0.5)
    adapter = spec.write(tmp_path / "adapter")
    merge_checkpoint(checkpoint(kind), adapter, tmp_path / "merged")
    prompts, options = prompts_of([5, 9], 500, seed=11), {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    expected = ask_elsewhere(tmp_path / "merged", {}, prompts, 8, mode="mixed", engine=options)["None"]
    for mode in ("mixed", "merged"):
        found = ask_elsewhere(checkpoint(kind), {"adapter": adapter}, prompts, 8, mode=mode, engine=options)
        assert found["adapter"] == expected, mode
        assert found["None"] != expected, mode


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "without its head"])
@pytest.mark.parametrize("kind", TOWERS)
def test_layers_are_found_by_their_names_in_the_checkpoint(
    kind: str, whole: bool, checkpoint: Callable[[str], Path], reference: Callable[[str], Any]
) -> None:
    """Whatever the class was that was adapted, vLLM's own mapping gets the names that it is made for."""
    rename = renamer(SimpleNamespace(hf_to_vllm_mapper=own_mapper(kind)), lookup("parse_fine_tuned_lora_name"))  # type: ignore[arg-type]
    names = [name if whole else name.removeprefix("model.") for name in reference(kind).weights]
    expected = [name.replace("model.language_model", "language_model.model") for name in reference(kind).weights]
    found = BaseModel(checkpoint(kind)).stored_names(record(names))
    one = torch.ones(1, 1)
    modules = [ServedModule(name, one, one, None, found[name]) for name in names]
    assert [place_name(module, rename, expected) for module in modules] == expected


def test_without_the_checkpoint_recorded_names_count() -> None:
    stored = {"model.language_model.layers.0.mlp.up_proj.weight": "language_model.model.layers.0.mlp.up_proj.weight"}
    names = ["model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.1.mlp.up_proj"]
    assert BaseModel(None).stored_names(record(names, stored)) == {
        names[0]: "language_model.model.layers.0.mlp.up_proj",
        names[1]: names[1],
    }


@pytest.mark.parametrize("kind", TOWERS)
def test_the_check_and_vllms_layers_agree(
    kind: str, checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    """The language tower is adapted in every form, and nothing else is."""
    base, model = checkpoint(kind), reference(kind).model
    linear = {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    language = "model.language_model.layers.0.mlp.gate_proj"
    adapters = {
        (form, name): make_adapter(form, {name: linear[name]}, (name,), rank=4, seed=1, size=0.3).write(
            tmp_path / f"{form}-{name}"
        )
        for name in (language, TOWERS[kind].vision)
        for form in FORMS
    }
    store = AdapterStore(base, max_rank=16, cache_directory=tmp_path / "cache")
    for (form, name), folder in adapters.items():
        if name == language:
            assert store.check(folder).modules == 1, form
        else:
            with pytest.raises(DoranError, match="vLLM serves this layer as another tower"):
                store.check(folder)
    need(kind)
    verdicts = ask_vllm({base: (False, list(adapters.values()))})
    assert {key: bool(verdicts[str(folder)]) for key, folder in adapters.items()} == {
        (form, name): name != language for form, name in adapters
    }


def test_an_adapter_of_other_weights_is_refused(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    spec = make_adapter("folded", reference("llava").weights, ALL, rank=4, seed=1, size=0.3)
    spec.write(tmp_path / "a")
    spec.write_scales(tmp_path / "a", fingerprint="sha256:" + "0" * 64)
    store = AdapterStore(checkpoint("llava"), max_rank=16, cache_directory=tmp_path / "cache")
    with pytest.raises(BaseMismatchError, match="base weights with fingerprint sha256:0000"):
        store.check(tmp_path / "a")
