"""Every architecture, from training to a merged checkpoint: each way to the adapted function gives the same outputs.

``--all-architectures`` runs all of them (``nox -s architectures``); without it, one of each kind.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from peft import PeftModel, get_peft_model
from tiny import Family
from torch import Tensor, nn

from doran_core.errors import DoranError
from doran_core.merge import merge_checkpoint
from doran_hf import DoranConfig
from doran_hf.random_start import random_parameters

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about these models

SHORT = (
    "llama tied", "gpt2", "mixtral", "mamba", "bert", "distilbert classifier", "t5", "bart", "vit", "siglip", "llava",
    "gemma3", "whisper",
)  # fmt: skip
"""Of each kind one."""

STATE = ("past_key_values", "cache_params", "state", "rope_deltas", "mems")
"""Outputs that are not the model's answer."""

REFUSED: dict[str, str] = {}
"""Families that are refused as a whole, with the words of the refusal; docs/peft-compatibility.md lists them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = list(FAMILIES) if metafunc.config.getoption("--all-architectures") else list(SHORT)
    if "end" in metafunc.fixturenames:
        ends = [(name, end) for name in names for end in tied_modules(FAMILIES[name])]
        metafunc.parametrize(("name", "end"), ends, ids=[f"{name}: {end}" for name, end in ends])
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names)


def tied_modules(family: Family) -> list[str]:
    """The modules that share a weight with another, as transformers says."""
    ties = family.make().all_tied_weights_keys
    keys = [key for tie in ties.items() for key in tie if key.endswith(".weight")]
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Every floating tensor that the model answers with."""
    with torch.no_grad():
        return list(_tensors(dict(model.eval()(**inputs))))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.double()] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = [part for name, part in value.items() if name not in STATE]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error, in units of the largest value (of at least 1)."""
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1.0)) for a, b in zip(found, expected, strict=True))


def train(model: nn.Module, family: Family) -> None:
    """Three steps of Adam, on nothing in particular."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # no adapter saves its statistics
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        found = model(**family.inputs())
        found["logits" if "logits" in found else "logits_per_text"].square().mean().backward()
        optimizer.step()
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost, f"never trained: {lost[:3]}"


def load(family: Family, folder: Path) -> Any:
    return family.auto_class.from_pretrained(folder, dtype=torch.float32).eval()


def check_every_way(family: Family, targets: str | list[str], folder: Path) -> None:
    """Unmerged = reloaded = merged in memory = merged, saved and reloaded = merged as files and loaded."""
    inputs = family.inputs()
    family.make().save_pretrained(folder / "base")
    base = load(family, folder / "base")
    before = outputs(base, inputs)
    torch.manual_seed(3)
    model = get_peft_model(base, DoranConfig(target_modules=targets, rank=4, **family.options))
    train(model, family)
    expected = outputs(model, inputs)
    assert distance(expected, before) > 1e-4

    model.save_pretrained(folder / "adapter")
    reloaded = PeftModel.from_pretrained(load(family, folder / "base"), folder / "adapter")
    found = {"reloaded": outputs(reloaded, inputs)}
    model.merge_adapter()
    found["merged in memory"] = outputs(model, inputs)
    model.unmerge_adapter()
    merged = copy.deepcopy(model).merge_and_unload()
    found["merged and unloaded"] = outputs(merged, inputs)
    merged.save_pretrained(folder / "saved")
    found["merged, saved and loaded"] = outputs(load(family, folder / "saved"), inputs)
    merge_checkpoint(folder / "base", folder / "adapter", folder / "merged")
    found["merged as files"] = outputs(load(family, folder / "merged"), inputs)
    wrong = {way: error for way, values in found.items() if (error := distance(values, expected)) > 1e-5}
    assert not wrong


def test_every_way_gives_the_same_function(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    if name in REFUSED:
        with pytest.raises(DoranError, match=REFUSED[name]):
            check_every_way(family, family.targets, tmp_path)
        return
    check_every_way(family, family.targets, tmp_path)


def test_an_adapter_on_one_end_of_a_tie_changes_that_end_alone(name: str, end: str, tmp_path: Path) -> None:
    """The merged checkpoint has both: a change of the other end would show in the outputs, for all of them count."""
    family = FAMILIES[name]
    if end.rpartition(".")[2] == "shared":
        with pytest.raises(DoranError, match="never called"):
            check_every_way(family, [end], tmp_path)
        return
    check_every_way(family, [end], tmp_path)


def test_ties_stay_where_no_end_is_adapted(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base = family.make()
    ties = base.all_tied_weights_keys
    if not ties:
        pytest.skip("no ties")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(load(family, tmp_path / "base"), DoranConfig(target_modules=family.targets, rank=4))
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    model.merge_and_unload().save_pretrained(tmp_path / "saved")
    for folder in ("merged", "saved"):
        loaded = load(family, tmp_path / folder)
        assert loaded.all_tied_weights_keys == ties
        assert all(loaded.get_parameter(a) is loaded.get_parameter(b) for a, b in ties.items())


def test_nothing_starts_at_random_in_a_checkpoint_of_the_model_itself(name: str, tmp_path: Path) -> None:
    FAMILIES[name].make().save_pretrained(tmp_path)
    assert random_parameters(load(FAMILIES[name], tmp_path)) == []


def test_the_matrix_is_wide_enough() -> None:
    assert len({family.config_class for family in FAMILIES.values()}) >= 40
    assert len(REFUSED) <= 5
