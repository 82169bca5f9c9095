"""Adapters of stacked expert weights without vLLM: which mode takes them, and the layouts that are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from doran_core import DoranConfig
from doran_core.adapter import TrainableAdapter, write_trainable
from doran_core.errors import CheckpointError, TargetError
from doran_core.merge.tensors import merged_tensors
from doran_serve import AdapterStore
from doran_serve.merged.experts import ExpertWeights
from doran_serve.store import check_mergeable


def write_stack(tmp_path: Path) -> tuple[str, Path]:
    """The name of a stacked parameter, a base with it and an adapter of it."""
    name = "model.layers.0.mlp.experts.down_proj"
    (tmp_path / "moe").mkdir()
    save_file({name: torch.randn(3, 16, 8)}, tmp_path / "moe" / "model.safetensors")
    (tmp_path / "moe" / "config.json").write_text("{}")
    parts = {
        "magnitude": torch.ones(3, 16),
        "tau.raw": torch.zeros(1),
        "factors.A": torch.randn(3, 2, 8),
        "factors.B": torch.randn(3, 16, 2),
    }
    config = DoranConfig(rank=2, factors="static", target_modules=[])
    write_trainable(TrainableAdapter(config, {name: parts}), tmp_path / "adapter")
    return name, tmp_path / "moe"


def test_stacked_expert_weights_are_for_merged_mode(tmp_path: Path) -> None:
    name, base = write_stack(tmp_path)
    mixed = AdapterStore(base, max_rank=16, cache_directory=tmp_path / "cache")
    with pytest.raises(TargetError, match=rf"stacked expert weights {re.escape(name)};.*merged mode.*doran merge"):
        mixed.check(tmp_path / "adapter")
    merged = AdapterStore(base, cache_directory=tmp_path / "cache", stacks=True)
    info = merged.check(tmp_path / "adapter")
    check_mergeable(info)
    assert (info.form, info.rank, info.modules, info.values) == ("trainable", 2, 1, 3 * 2 * (8 + 16))
    assert (info.stacks, info.others) == ((name,), ())
    with pytest.raises(CheckpointError, match="needs the base's own files"):
        AdapterStore(None, stacks=True).check(tmp_path / "adapter")
    save_file({name: torch.randn(4, 16, 8)}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="the adapter has 3 experts"):
        AdapterStore(base, cache_directory=tmp_path / "cache", stacks=True).check(tmp_path / "adapter")


class Experts(nn.Module):
    """A layer as vLLM has it, whose loader may put the halves of gate and up the other way round."""

    def __init__(self, swaps_halves: bool, moves: bool) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.zeros(3, 16, 8), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.zeros(3, 4, 8), requires_grad=False)
        self.moe_config = SimpleNamespace(moe_parallel_config=SimpleNamespace(enable_eplb=moves))
        self.quant_method = SimpleNamespace(unquantized_backend=SimpleNamespace(value="Other"))
        self.swaps_halves = swaps_halves


class Served(nn.Module):
    """A vLLM model of one such layer."""

    def __init__(self, base: Path, *, swaps_halves: bool = False, moves: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Experts(swaps_halves, moves)])
        self.load_weights(load_file(base / "model.safetensors").items())
        if swaps_halves:  # as a backend does after loading
            layer = self.layers[0]
            layer.w13_weight.data = layer.w13_weight.data.roll(8, 1)

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in tensors:
            self.layers[0].w13_weight.data.copy_(tensor)


def test_experts_in_an_unknown_layout_are_refused(tmp_path: Path) -> None:
    name, base = write_stack(tmp_path)
    adapter = AdapterStore(base, cache_directory=tmp_path / "cache", stacks=True).load(tmp_path / "adapter")
    assert adapter is not None
    before = load_file(base / "model.safetensors")[name]

    def weights(served: Served) -> ExpertWeights:
        return ExpertWeights(served, torch.clone, partial=False)

    served = Served(base)
    swapped = weights(served)
    swapped.check(adapter.stacks)
    for stacks in (adapter.stacks, {}):
        swapped.swap(stacks)
        expected = dict(merged_tensors(adapter.stacks[name]))[name] if stacks else before
        assert torch.equal(served.layers[0].w13_weight, expected)
    with pytest.raises(TargetError, match=rf"{re.escape(name)}: vLLM keeps .* a layout .*backend Other.*triton"):
        weights(Served(base, swaps_halves=True)).check(adapter.stacks)
    with pytest.raises(TargetError, match="experts that vLLM moves"):
        weights(Served(base, moves=True)).check(adapter.stacks)
    elsewhere = Served(base)
    elsewhere.layers = nn.ModuleDict({"7": elsewhere.layers[0]})
    elsewhere.load_weights = lambda tensors: None  # type: ignore[method-assign]
    with pytest.raises(TargetError, match="into no parameter of experts"):
        weights(elsewhere).check(adapter.stacks)
