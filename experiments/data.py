"""Examples and the order in which a run sees them. Texts of like length go together, to save padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.errors import ExperimentError

__all__ = ["Examples", "Split", "batches_of", "bucket_schedule", "subset"]

BUCKETS = 4


@dataclass(frozen=True)
class Examples:
    """Inputs with their labels.

    Attributes:
        inputs: token ids ``[N, longest]``, padded, or images ``[N, channels, height, width]``.
        lengths: tokens of each text ``[N]``; None for images.
        labels: ``[N]``.
        groups: number of the test that each belongs to ``[N]``; None where there is one.
        choices: which classes are possible answers ``[N, classes]``; None for all.
    """

    inputs: Tensor
    lengths: Tensor | None
    labels: Tensor
    groups: Tensor | None = None
    choices: Tensor | None = None

    def to(self, device: torch.device) -> Examples:
        """The same on another device."""
        tensors = (self.inputs, self.lengths, self.labels, self.groups, self.choices)
        return Examples(*(None if tensor is None else tensor.to(device) for tensor in tensors))  # type: ignore[arg-type]

    def possible(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Logits ``[..., classes]`` of examples ``[...]``, minus infinity where a class is no possible answer."""
        return logits if self.choices is None else logits.masked_fill(~self.choices[indices], -torch.inf)

    def take(self, indices: Tensor, longest: int | None) -> tuple[Tensor, Tensor | None]:
        """Inputs and lengths of some examples, texts cut to ``longest`` tokens."""
        inputs = self.inputs[indices]
        if self.lengths is None:
            return inputs, None
        return inputs[:, :longest], self.lengths[indices]


@dataclass(frozen=True)
class Split:
    """Training pool, validation (for choosing learning rates) and test.

    Attributes:
        train, validation, test: disjoint examples.
        bucket: which bucket of like lengths each training example is in ``[N]``.
        longest: tokens of the longest example of each bucket; empty for images.
        tests: names of the tests that ``test.groups`` numbers; empty where there is one.
    """

    train: Examples
    validation: Examples
    test: Examples
    bucket: np.ndarray
    longest: tuple[int, ...]
    tests: tuple[str, ...] = ()

    @classmethod
    def of(cls, train: Examples, validation: Examples, test: Examples, *, tests: tuple[str, ...] = ()) -> Split:
        """With buckets of equal numbers of training texts."""
        if train.lengths is None:
            return cls(train, validation, test, np.zeros(len(train.labels), dtype=np.int64), (), tests)
        lengths = train.lengths.numpy()
        edges = np.quantile(lengths, np.linspace(0, 1, BUCKETS + 1)[1:-1], method="higher")
        bucket = np.asarray(np.searchsorted(edges, lengths, side="left"))
        longest = tuple(int(lengths[bucket == b].max()) for b in range(BUCKETS))
        return cls(train, validation, test, bucket, longest, tests)

    @property
    def buckets(self) -> int:
        """How many there are."""
        return len(self.longest) or 1


def subset(split: Split, fraction: float, seed: int) -> np.ndarray:
    """Indices of a share of the training examples, as even over labels and buckets as can be.

    The subset of a seed is part of that seed's larger subsets.
    """
    random = np.random.default_rng([seed, 1])
    order = random.permutation(len(split.bucket))
    labels = split.train.labels.cpu().numpy()[order]
    strata = split.bucket[order] * (labels.max() + 1) + labels
    # The i-th example of its stratum comes at (i + 1/2) / size of it: a prefix has every stratum's share.
    position = np.empty(len(order))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    count = max(1, round(fraction * len(order)))
    chosen: np.ndarray = order[np.argsort(position, kind="stable")[:count]]
    return chosen


def bucket_schedule(buckets: int, steps: int) -> np.ndarray:
    """The bucket of every step ``[steps]``, the same for all runs: each once in every ``buckets`` steps."""
    random = np.random.default_rng(0)
    rounds = -(-steps // buckets)
    schedule: np.ndarray = np.concatenate([random.permutation(buckets) for _ in range(rounds)])
    return schedule[:steps]


def batches_of(split: Split, indices: Sequence[int] | np.ndarray, steps: int, batch: int, seed: int) -> np.ndarray:
    """Examples of each step ``[steps, batch]``: every bucket is gone through in ever new orders.

    Raises:
        ExperimentError: a bucket has no example among ``indices``.
    """
    random = np.random.default_rng([seed, 2])
    schedule = bucket_schedule(split.buckets, steps)
    result: np.ndarray = np.empty((steps, batch), dtype=np.int64)
    indices = np.asarray(indices)
    for bucket in range(split.buckets):
        members = indices[split.bucket[indices] == bucket]
        if len(members) == 0:
            raise ExperimentError(f"{len(indices)} training examples leave none in length bucket {bucket}; take more")
        places = np.flatnonzero(schedule == bucket)
        rounds = -(-len(places) * batch // len(members))
        order = np.concatenate([random.permutation(members) for _ in range(max(rounds, 1))])
        result[places] = order[: len(places) * batch].reshape(len(places), batch)
    return result
