"""Running statistics that training moves and an adapter does not save: said on saving, with what helps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from doran_core import DoranConfig, adapt, load


def make() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.BatchNorm1d(4)).double()


def train(model: nn.Module, prepare: Callable[[nn.Module], object] = lambda model: None) -> None:
    model.train()
    prepare(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(
            torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        ).square().sum().backward()
        optimizer.step()
    model.eval()


def reload_error(model: nn.Module, folder: Path) -> float:
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    other = make()
    load(other, folder)
    return float((other.eval()(x) - model(x)).abs().max())


def test_moved_statistics_are_named_and_make_a_difference(tmp_path: Path) -> None:
    model = make()
    handle = adapt(model, DoranConfig(rank=2, target_modules=["0", "2"]))
    train(model)
    with pytest.warns(UserWarning, match=r"running statistics of 1, 3 have moved .* eval mode .* modules_to_save"):
        handle.save(tmp_path / "a")
    assert reload_error(model, tmp_path / "a") > 1e-2


def test_layers_in_eval_mode_or_saved_in_full_are_right_and_not_named(tmp_path: Path) -> None:
    def freeze(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()

    for name, saved, prepare in (("frozen", None, freeze), ("saved", ["1", "3"], lambda model: None)):
        model = make()
        handle = adapt(model, DoranConfig(rank=2, target_modules=["0", "2"], modules_to_save=saved))
        train(model, prepare)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle.save(tmp_path / name)
        assert reload_error(model, tmp_path / name) < 1e-12, name


def test_another_dtype_is_no_movement_and_what_is_forgotten_is_gone(tmp_path: Path) -> None:
    model = make()
    train(model)  # statistics that other dtypes round
    handle = adapt(model, DoranConfig(rank=2, target_modules=["0", "2"]))
    model.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.save(tmp_path / "a")
    handle.remove()
    assert not any("doran" in key for module in model.modules() for key in vars(module))
