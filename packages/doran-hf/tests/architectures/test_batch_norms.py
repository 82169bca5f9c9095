"""Batch norms of whole models: moved statistics are named on saving, and either remedy gives the same function."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from peft import PeftModel, get_peft_model
from test_architectures import distance, load, outputs
from torch import nn

from doran_core.merge import merge_checkpoint
from doran_hf import DoranConfig

NORMS = {"resnet": ["normalization"], "segformer": ["batch_norm"]}


def adapted(name: str, folder: Path, saved: list[str] | None, prepare: Callable[[nn.Module], None]) -> Any:
    """The base written, adapted and trained."""
    family = FAMILIES[name]
    family.make().save_pretrained(folder / "base")
    config = DoranConfig(target_modules=family.targets, rank=4, modules_to_save=saved, **family.options)
    model = get_peft_model(load(family, folder / "base"), config)
    model.train()
    prepare(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**family.inputs())["logits"].square().mean().backward()
        optimizer.step()
    return model.eval()


def errors(name: str, folder: Path, model: Any) -> list[float]:
    """Of the adapter loaded, and merged as files."""
    family = FAMILIES[name]
    expected = outputs(model, family.inputs())
    loaded = PeftModel.from_pretrained(load(family, folder / "base"), folder / "adapter")
    merge_checkpoint(folder / "base", folder / "adapter", folder / "merged")
    return [distance(outputs(each, family.inputs()), expected) for each in (loaded, load(family, folder / "merged"))]


def freeze(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@pytest.mark.parametrize("name", NORMS)
def test_moved_statistics_are_named(name: str, tmp_path: Path) -> None:
    model = adapted(name, tmp_path, None, lambda model: None)
    with pytest.warns(UserWarning, match=rf"running statistics of \S*{NORMS[name][0]}.* have moved") as said:
        model.save_pretrained(tmp_path / "adapter")
    text = next(str(one.message) for one in said if "running statistics" in str(one.message))
    assert "base_model" not in text
    assert min(errors(name, tmp_path, model)) > 1e-3


@pytest.mark.parametrize("remedy", ["frozen", "saved"])
@pytest.mark.parametrize("name", NORMS)
def test_either_remedy_gives_the_same_function(name: str, remedy: str, tmp_path: Path) -> None:
    frozen = remedy == "frozen"
    model = adapted(name, tmp_path, None if frozen else NORMS[name], freeze if frozen else lambda model: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*running statistics")
        model.save_pretrained(tmp_path / "adapter")
    assert max(errors(name, tmp_path, model)) < 1e-5
