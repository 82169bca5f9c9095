"""A run in a stack is the run that it would be alone, and that PEFT and doran_core would make of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from doran_core import adapt
from doran_core.diagnostics import GradientProbe
from experiments.data import batches_of, bucket_schedule, subset
from experiments.digits import digits_split, vit_config
from experiments.methods import METHODS, adapter_parameters, matched_rank, method_config
from experiments.study import Run
from experiments.tasks import Task
from experiments.train import WARMUP, train_runs

TARGETS = ("q_proj", "v_proj")
STEPS, BATCH, RATE, HEAD_RATE = 6, 8, 1e-2, 2e-3


def features(model: nn.Module, inputs: Tensor, lengths: Tensor | None) -> Tensor:
    hidden: Tensor = model(pixel_values=inputs).last_hidden_state[:, 0]
    return hidden


@pytest.fixture(scope="module")
def task() -> Task:
    """A ViT with random weights, on the digits."""
    from transformers import ViTModel

    torch.manual_seed(7)
    model = ViTModel(vit_config(), add_pooling_layer=False).requires_grad_(False).eval()

    def head(seed: int) -> tuple[Tensor, Tensor]:
        return 0.02 * torch.randn(10, 64, generator=torch.Generator().manual_seed(seed)), torch.zeros(10)

    return Task(model, features, head, digits_split())


def run_of(method: str, seed: int, rate: float = RATE, **options: object) -> Run:
    return Run(
        model="vit", method=method, options=tuple(sorted(options.items())), targets=TARGETS, budget_rank=4,
        match="rank", rate=rate, head_rate=HEAD_RATE, steps=STEPS, batch=BATCH, fraction=1.0, seed=seed, evaluated=20,
    )  # fmt: skip


def losses_of(task: Task, runs: list[Run]) -> Tensor:
    split = task.split
    outcome = train_runs(task, (split.train, split.validation, split.test), runs, torch.device("cpu"))
    return torch.from_numpy(outcome.curves["loss"])


def plain_losses(
    task: Task,
    run: Run,
    model: nn.Module,
    parameters: list[nn.Parameter],
    faster: tuple[list[nn.Parameter], float] = ([], 0.0),
) -> Tensor:
    """The same training with torch.optim.Adam and a plain loop; ``model`` is adapted already."""
    weight, bias = (nn.Parameter(part) for part in task.head(run.seed))
    groups = [(parameters, run.rate), ([weight, bias], HEAD_RATE), faster]
    optimizer = torch.optim.Adam([{"params": members, "lr": rate} for members, rate in groups if members])
    warmup = max(1, -int(-WARMUP * STEPS // 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warmup if step < warmup else (STEPS - step) / (STEPS - warmup)
    )
    split = task.split
    order = torch.from_numpy(batches_of(split, subset(split, 1.0, run.seed), STEPS, BATCH, run.seed))
    losses = []
    for batch in order:
        logits = F.linear(features(model, split.train.inputs[batch], None), weight, bias)
        loss = F.cross_entropy(logits, split.train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("method", ["lora", "dora", "tau_only", "generators_only", "doran"])
def test_a_run_in_a_stack_is_the_run_alone(task: Task, method: str) -> None:
    runs = [run_of(method, seed, rate) for seed, rate in ((0, RATE), (1, RATE), (2, 3 * RATE))]
    stacked = losses_of(task, runs)
    alone = torch.cat([losses_of(task, [run]) for run in runs])
    assert torch.allclose(stacked, alone, atol=2e-4)
    assert (stacked[0] - stacked[1]).abs().max() > 1e-2  # seeds do differ


@pytest.mark.parametrize("method", ["tau_only", "generators_only", "doran"])
def test_a_stack_trains_as_doran_core_with_torchs_adam(task: Task, method: str) -> None:
    run = run_of(method, seed=3)
    torch.manual_seed(3)
    model = copy.deepcopy(task.model)
    handle = adapt(model, method_config(method, {}, list(TARGETS), 4))
    expected = plain_losses(task, run, model, list(handle.parameters()))
    assert torch.allclose(losses_of(task, [run, run_of(method, seed=4)])[0], expected, atol=2e-4)


@pytest.mark.parametrize("method", ["tau_only", "doran"])
def test_a_rate_of_its_own_for_the_last_layer_of_b(task: Task, method: str) -> None:
    run = run_of(method, seed=3, b_rate=4)
    torch.manual_seed(3)
    model = copy.deepcopy(task.model)
    handle = adapt(model, method_config(method, {}, list(TARGETS), 4))
    last = [
        getattr(layer.doran_adapter.factors, "w2_B" if method == "doran" else "B") for layer in handle.layers.values()
    ]
    others = [p for p in handle.parameters() if all(p is not other for other in last)]
    expected = plain_losses(task, run, model, others, (last, 4 * RATE))
    assert torch.allclose(losses_of(task, [run, run_of(method, seed=4, b_rate=4)])[0], expected, atol=2e-4)


def test_widths_may_be_told_in_ranks() -> None:
    config = method_config("doran", {"hidden_dim": "2 ranks", "embedding_dim": "1 ranks"}, ["q"], 24)
    assert (config.hidden_dim, config.embedding_dim) == (48, 24)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_and_dora_are_those_of_peft(task: Task, method: str) -> None:
    run = run_of(method, seed=5)
    torch.manual_seed(5)
    start = copy.deepcopy(task.model)
    handle = adapt(start, method_config(method, {}, list(TARGETS), 4))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), use_dora=method == "dora")
    peft = get_peft_model(copy.deepcopy(task.model), config)
    with torch.no_grad():
        for name, layer in handle.layers.items():
            A, _ = layer.doran_adapter.factor_pair()
            peft.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(A)
    expected = plain_losses(task, run, peft, [p for p in peft.parameters() if p.requires_grad])
    assert torch.allclose(losses_of(task, [run_of(method, seed=6), run])[1], expected, atol=2e-4)


def test_a_run_that_becomes_infinite_leaves_the_others_alone(task: Task) -> None:
    good, bad = run_of("doran", seed=0), run_of("doran", seed=0, rate=float("inf"))
    stacked = losses_of(task, [bad, good])
    assert not stacked[0].isfinite().all()
    assert torch.allclose(stacked[1], losses_of(task, [good])[0], atol=2e-4)


@pytest.mark.parametrize(
    "options", [{"tau_kind": "gaussian"}, {"experts": True, "expert_mask": "element", "expert_dropout": 0.5}]
)
def test_runs_of_a_stack_draw_their_own_noise(task: Task, options: dict[str, object]) -> None:
    twice = losses_of(task, [run_of("doran", 0, **options), run_of("doran", 0, **options)])
    if "experts" in options:  # B is 0 at the first step, whatever the mask
        assert twice[0, 0] == pytest.approx(float(twice[1, 0]), abs=1e-5)
    assert not torch.equal(twice[0], twice[1])


@pytest.mark.parametrize("method", ["full", "head"])
def test_whole_training_and_head_only_are_torchs_adam(task: Task, method: str) -> None:
    run = run_of(method, seed=0, rate=HEAD_RATE)
    model = copy.deepcopy(task.model).requires_grad_(method == "full")
    expected = plain_losses(task, run, model, [p for p in model.parameters() if p.requires_grad])
    assert torch.allclose(losses_of(task, [run])[0], expected, atol=2e-4)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.adapter is not None])
def test_the_matched_rank_is_the_nearest(task: Task, method: str) -> None:
    budget = adapter_parameters(task.model, "lora", {}, list(TARGETS), 8)
    assert budget == 8 * 4 * 2 * (64 + 64)
    rank, count = matched_rank(task.model, method, {}, list(TARGETS), reference_rank=8)
    assert count == adapter_parameters(task.model, method, {}, list(TARGETS), rank)
    for other in (rank - 1, rank + 1):
        if other:
            assert abs(count - budget) <= abs(adapter_parameters(task.model, method, {}, list(TARGETS), other) - budget)


def test_the_schedule_has_each_bucket_equally_often() -> None:
    counts = torch.bincount(torch.from_numpy(bucket_schedule(4, 40)))
    assert counts.tolist() == [10, 10, 10, 10]


@pytest.mark.parametrize("method", ["tau_only", "doran"])
def test_the_gradients_split_is_doran_cores(task: Task, method: str) -> None:
    run = run_of(method, seed=3)
    torch.manual_seed(3)
    model = copy.deepcopy(task.model)
    handle = adapt(model, method_config(method, {}, list(TARGETS), 4))
    weight, bias = task.head(run.seed)
    split = task.split
    batch = torch.from_numpy(batches_of(split, subset(split, 1.0, run.seed), STEPS, BATCH, run.seed))[0]
    with GradientProbe(model) as probe:
        logits = F.linear(features(model, split.train.inputs[batch], None), weight, bias)
        F.cross_entropy(logits, split.train.labels[batch]).backward()
    parts = split.train, split.validation, split.test
    outcome = train_runs(task, parts, [run_of(method, seed=4), run], torch.device("cpu"))
    along, kept = outcome.curves["along"][1], outcome.curves["kept"][1]
    for index, name in enumerate(handle.layers):
        expected = probe.splits()[name]
        total = expected.parallel**2 + expected.orthogonal**2
        assert along[0, index] == pytest.approx(expected.parallel**2 / total, rel=1e-3)
        assert kept[0, index] == pytest.approx(expected.kept_parallel**2 / total, rel=1e-3)
    assert np.isfinite(along[:-1]).all()
    assert np.isnan(along[-1]).all()
