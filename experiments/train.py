"""Train a stack of runs that differ in rate, share of the data and seed alone, and measure each of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doran_core.diagnostics import delta_similarity, effective_rank, singular_values
from experiments.data import Examples, batches_of, bucket_schedule, subset
from experiments.methods import METHODS, matched_rank, method_config
from experiments.stack import StackedAdapters
from experiments.study import Run
from experiments.tasks import Task

__all__ = ["Outcome", "train_runs"]

WARMUP = 0.06
"""Share of the steps in which the rate rises; it falls to 0 in the others, both along a line."""
TAU_POINTS = 30
"""How often tau is recorded in a run."""
EVALUATION_TOKENS = 2**17
"""Most tokens of one batch of evaluation, all runs of the stack together."""
SPIKE = 2.0
"""A step is a spike when its loss is this many times the median of the ten before it, and above the first loss."""


@dataclass(frozen=True)
class Outcome:
    """What a stack of runs came to.

    Attributes:
        rows: one record per run.
        curves: arrays with the runs first: ``loss`` and ``gradient`` ``[K, steps]``; ``tau`` and ``norm``
            ``[K, points, layers]``; ``along`` and ``kept``, shares of the squared gradient, of the same shape and NaN
            at the end, where there is no gradient; with ``measure_factors`` ``spectrum`` ``[K, layers, r]``.
        points: steps at which tau was recorded.
        layers: names of the adapted layers.
    """

    rows: list[dict[str, Any]]
    curves: dict[str, np.ndarray]
    points: list[int]
    layers: list[str]


class _Trained(Protocol):
    """The part of a stack that the methods do differently."""

    model: nn.Module
    size: int
    layers: list[str]

    def tensors(self) -> list[Tensor]:
        """What trains, K in front (or K = 1 and left out)."""
        ...

    def prepare(self, *, training: bool) -> None:
        """Before each forward pass."""
        ...


class _HeadOnly:
    """No adapter."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.model = copy.deepcopy(task.model).to(device)
        self.size = 0
        self.layers: list[str] = []

    def tensors(self) -> list[Tensor]:
        return []

    def prepare(self, *, training: bool) -> None:
        """Nothing to do."""


class _Whole(_HeadOnly):
    """Every weight, in a stack of one."""

    def __init__(self, task: Task, device: torch.device) -> None:
        super().__init__(task, device)
        self.model.requires_grad_(True)
        self.size = sum(p.numel() for p in self.model.parameters())

    def tensors(self) -> list[Tensor]:
        return list(self.model.parameters())


class _Adapted(StackedAdapters):
    """Adapters of the runs."""

    def tensors(self) -> list[Tensor]:
        return [self.flat]


class _Adam:
    """Adam with a rate per run, or per run and number, on tensors with the runs in front."""

    def __init__(self, tensors: list[Tensor], rates: list[Tensor]) -> None:
        self._tensors = tensors
        self._rates = [r.view(*r.shape, *[1] * (t.dim() - r.dim())) for t, r in zip(tensors, rates, strict=True)]
        self._mean = [torch.zeros_like(t) for t in tensors]
        self._square = [torch.zeros_like(t) for t in tensors]
        self._step = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], factor: float) -> None:
        """One step of ``factor`` times the rates."""
        self._step += 1
        bias1, bias2 = 1 - 0.9**self._step, 1 - 0.999**self._step
        for tensor, gradient, mean, square, rate in zip(
            self._tensors, gradients, self._mean, self._square, self._rates, strict=True
        ):
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            tensor.sub_(rate * (factor / bias1) * mean / ((square / bias2).sqrt_().add_(1e-8)))


def rate_factor(step: int, steps: int) -> float:
    """The share of the peak rate at a step, from 0: up to 1 in the warm-up, then down to 0 at the end."""
    warmup = max(1, math.ceil(WARMUP * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def _trained(task: Task, runs: Sequence[Run], device: torch.device) -> tuple[Any, int]:
    """What trains, and its rank."""
    first = runs[0]
    method = METHODS[first.method]
    if method.whole:
        return _Whole(task, device), 0
    if method.adapter is None:
        return _HeadOnly(task, device), 0
    options, targets = dict(first.options), [task.renamed.get(name, name) for name in first.targets]
    rank = first.budget_rank
    if first.match == "parameters":
        rank, _ = matched_rank(task.model, first.method, options, targets, reference_rank=rank)
    config = method_config(first.method, options, targets, rank)
    seeds = [run.seed for run in runs]
    return _Adapted(task.model, config, seeds, device, scaled=method.scaled), rank


class _Stack:
    """The runs that are trained side by side: what trains in each, their classifiers, and the classes' logits."""

    def __init__(self, task: Task, runs: Sequence[Run], device: torch.device) -> None:
        self.task, self.runs, self.count = task, runs, len(runs)
        self.trained, self.rank = _trained(task, runs, device)
        heads = [task.head(run.seed) for run in runs]
        self.weight = torch.stack([w for w, _ in heads]).to(device).requires_grad_()
        self.bias = torch.stack([b for _, b in heads]).to(device).requires_grad_()
        self.tensors = [*self.trained.tensors(), self.weight, self.bias]

    def rates(self) -> list[Tensor]:
        """The learning rates of :attr:`tensors`."""
        first, own = self.runs[0], self.trained.tensors()
        rates = torch.tensor([run.rate for run in self.runs], device=self.weight.device)
        head_rates = rates if first.method == "head" else torch.full_like(rates, first.head_rate)
        own_rates = [rates[0] if METHODS[first.method].whole else rates] * len(own)
        if (b_rate := dict(first.options).get("b_rate")) is not None:
            own_rates[0] = rates[:, None] * self.trained.multiples(float(b_rate))
        return [*own_rates, head_rates, head_rates]

    def logits(self, examples: Examples, chosen: Tensor, longest: int | None) -> Tensor:
        """``[K, n, classes]`` for indices ``[K, n]``."""
        inputs, lengths = examples.take(chosen.flatten(), longest)
        features = self.task.features(self.trained.model, inputs, lengths).view(self.count, chosen.shape[1], -1)
        return examples.possible(torch.baddbmm(self.bias[:, None], features, self.weight.mT), chosen)

    def sizes(self) -> dict[str, int]:
        """What each run trains, for its record."""
        head = self.weight[0].numel() + self.bias[0].numel()
        return {"rank": self.rank, "parameters": self.trained.size, "head_parameters": head}


def train_runs(
    task: Task, data: tuple[Examples, Examples, Examples], runs: Sequence[Run], device: torch.device
) -> Outcome:
    """Train the runs side by side.

    Args:
        task: of the runs' model.
        data: the task's training, validation and test examples on the device.
        runs: of one cohort; one alone if the method trains the whole model.
        device: where to compute.
    """
    started = time.monotonic()
    first = runs[0]
    stack = _Stack(task, runs, device)
    trained = stack.trained
    points = sorted({round(p) for p in np.linspace(0, first.steps, TAU_POINTS)}) if trained.layers else []
    curves = _steps(stack, data[0], points)

    trained.prepare(training=False)
    measures = {
        "validation": _evaluate(stack.logits, data[1], stack.count, first.evaluated),
        "test": _evaluate(stack.logits, data[2], stack.count, first.evaluated),
    }
    factor_rows: list[dict[str, float]] = [{} for _ in runs]
    if first.measure_factors and trained.layers:
        curves["spectrum"], factor_rows = _factor_measures(trained)
    seconds = (time.monotonic() - started) / stack.count
    rows = []
    for k, run in enumerate(runs):
        row = {
            "id": run.id, **stack.sizes(),
            "seconds": round(seconds, 3), "stack": stack.count, "device": _device_name(device),
        }  # fmt: skip
        for part, measured in measures.items():
            row[f"{part}_accuracy"], row[f"{part}_loss"] = round(measured.accuracy[k], 5), _finite(measured.loss[k])
        for name, accuracy in zip(task.split.tests, measures["test"].by_group, strict=False):
            row[f"{name}_accuracy"] = round(accuracy[k], 5)
        row |= _curve_measures(curves["loss"][k], curves["gradient"][k]) | factor_rows[k]
        if "tau" in curves:
            row["tau_start"], row["tau_end"] = (_finite(float(curves["tau"][k, i].mean())) for i in (0, -1))
            row["norm_end"] = _finite(float(curves["norm"][k, -1].mean()))
        rows.append(row)
    return Outcome(rows, curves, points, trained.layers)


def _steps(stack: _Stack, train: Examples, points: Sequence[int]) -> dict[str, np.ndarray]:
    """Train for all steps; the curves of losses and gradient norms, and of tau and the row norms at the points."""
    task, runs, first, trained = stack.task, stack.runs, stack.runs[0], stack.trained
    optimizer = _Adam(stack.tensors, stack.rates())
    torch.manual_seed(first.seed)  # masks and noise are drawn on the device, for the whole stack
    schedule = bucket_schedule(task.split.buckets, first.steps)
    order = np.stack([
        batches_of(task.split, subset(task.split, r.fraction, r.seed), r.steps, r.batch, r.seed) for r in runs
    ], axis=1)  # [steps, K, batch]  # fmt: skip
    device = stack.weight.device
    indices = torch.from_numpy(order).to(device)
    losses = torch.empty(first.steps, stack.count, device=device)
    gradient_norms = torch.empty(first.steps, stack.count, device=device)
    states: list[tuple[Tensor, Tensor]] = []
    shares: list[Tensor] = []
    for step in range(first.steps):
        if step in points:
            states.append(trained.tau_and_norm())
            trained.watch_gradients()
        trained.prepare(training=True)
        longest = task.split.longest[schedule[step]] if task.split.longest else None
        logits = stack.logits(train, indices[step], longest)
        labels = train.labels[indices[step]]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(stack.count, -1).mean(1)
        # A model trained whole may have weights that its features do not use (DINOv2's mask token).
        gradients = torch.autograd.grad(loss.sum(), stack.tensors, materialize_grads=True)
        if step in points and (split := trained.gradient_shares()) is not None:
            shares.append(split)
        losses[step] = loss.detach()
        gradient_norms[step] = _norms(gradients, stack.count)
        optimizer.step(gradients, rate_factor(step, first.steps))
    if first.steps in points:
        states.append(trained.tau_and_norm())
    curves = {"loss": losses.T.cpu().numpy(), "gradient": gradient_norms.T.cpu().numpy()}
    if states:
        curves["tau"] = torch.stack([tau for tau, _ in states], dim=1).numpy()
        curves["norm"] = torch.stack([norm for _, norm in states], dim=1).numpy()
    if shares:
        shares += [torch.full_like(shares[0], torch.nan)] * (len(states) - len(shares))
        curves["along"], curves["kept"] = torch.stack(shares, dim=2).numpy()
    return curves


def _norms(gradients: Sequence[Tensor], count: int) -> Tensor:
    """Norm of each run's gradient ``[K]``, or of the only run's where tensors leave K out."""
    if count == 1:
        whole: Tensor = torch.stack([g.norm() for g in gradients]).norm()
        return whole[None]
    each: Tensor = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    return each


@dataclass(frozen=True)
class _Measured:
    """What an evaluation found of each run. The accuracy is the mean over the groups; each has its own, too."""

    accuracy: list[float]
    loss: list[float]
    by_group: list[list[float]]


@torch.no_grad()
def _evaluate(logits_of: Any, examples: Examples, count: int, most: int | None) -> _Measured:
    """Accuracy and mean cross-entropy of each run on the examples, or the first ``most`` of each group of them."""
    device = examples.labels.device
    groups = torch.zeros_like(examples.labels) if examples.groups is None else examples.groups
    numbers: Tensor = torch.unique(groups)
    order = torch.cat([(groups == number).nonzero()[:most, 0] for number in numbers])
    if examples.lengths is not None:
        order = order[examples.lengths[order].argsort(stable=True)]
    size = len(order)
    lengths = None if examples.lengths is None else examples.lengths[order].tolist()
    # An image of 8 x 8 has 17 tokens, one of 98 x 98 has 50.
    tokens = max(17, examples.inputs.shape[-1] ** 2 // 14**2) if lengths is None else lengths[-1]
    per_batch = max(1, EVALUATION_TOKENS // (tokens * count))
    correct = torch.zeros(count, int(numbers.max()) + 1, device=device)
    total = torch.zeros(count, device=device)
    for start in range(0, size, per_batch):
        chosen = order[start : start + per_batch]
        longest = None if lengths is None else lengths[min(start + per_batch, size) - 1]
        logits = logits_of(examples, chosen.expand(count, -1), longest)
        labels = examples.labels[chosen].expand(count, -1)
        correct.index_add_(1, groups[chosen], (logits.argmax(-1) == labels).float())
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(count, -1).sum(1)
    by_group = (correct[:, numbers] / groups[order].bincount()[numbers]).T
    return _Measured(by_group.mean(0).tolist(), (total / size).tolist(), by_group.tolist())


def _curve_measures(loss: np.ndarray, gradient: np.ndarray) -> dict[str, Any]:
    """First and last loss, spikes, the largest gradient, and whether the run diverged.

    Diverged: a loss that is not finite, or a mean loss of the last tenth above the first loss.
    """
    tail = max(1, len(loss) // 10)
    last = float(loss[-tail:].mean())
    spikes = sum(
        bool(loss[i] > SPIKE * np.median(loss[i - 10 : i]) and loss[i] > loss[0]) for i in range(10, len(loss))
    )
    finite = bool(np.isfinite(loss).all())
    return {
        "first_loss": _finite(float(loss[0])),
        "last_loss": _finite(last),
        "largest_loss": _finite(float(np.nanmax(loss))) if finite else None,
        "largest_gradient": _finite(float(gradient.max())),
        "median_gradient": _finite(float(np.median(gradient))),
        "spikes": spikes,
        "diverged": not finite or last > float(loss[0]),
    }


def _factor_measures(trained: StackedAdapters) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Singular values of every update, and each run's mean effective rank and similarities between layers."""
    pairs = trained.factor_pairs()
    projections: dict[str, list[int]] = {}
    for index, name in enumerate(trained.layers):
        projections.setdefault(name.rpartition(".")[2], []).append(index)
    spectra: list[list[np.ndarray]] = []
    rows: list[dict[str, float]] = []
    for k in range(len(pairs[0][0])):
        own = [(A[k], B[k]) for A, B in pairs]
        if not all(bool(A.isfinite().all() and B.isfinite().all()) for A, B in own):
            spectra.append([np.full(own[0][0].shape[0], np.nan)] * len(own))
            rows.append({})
            continue
        values = [singular_values(A, B) for A, B in own]
        similarity = [_off_diagonal(delta_similarity([own[i] for i in group])) for group in projections.values()]
        spectra.append([v.numpy() for v in values])
        rows.append({
            "effective_rank": round(float(np.mean([effective_rank(v) for v in values])), 4),
            "update_similarity": round(float(np.mean(similarity)), 4),
        })  # fmt: skip
    return np.array(spectra), rows


def _off_diagonal(matrix: Tensor) -> float:
    """Mean of the entries off the diagonal."""
    size = len(matrix)
    return float((matrix.sum() - matrix.trace()) / (size * (size - 1)))


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
