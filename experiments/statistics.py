"""Intervals over seeds, differences of paired runs, and the data that one method needs for another's accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "data_ratio", "mean_interval", "needed_fraction", "paired_difference"]

# Two-sided 95% quantiles of Student's t by degrees of freedom (any table); 1.96 beyond.
_T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
BOOTSTRAPS = 4000


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval.

    Attributes:
        value: estimate.
        low, high: ends; NaN where one run alone says nothing of the spread.
        count: runs.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of 0."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean and 95% t interval of independent values.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("mean_interval: no values")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    quantile = _T95[array.size - 2] if array.size - 2 < len(_T95) else 1.96
    half = quantile * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half, int(array.size))


def paired_difference(values: dict[int, float], reference: dict[int, float]) -> Interval | None:
    """Mean of ``value - reference`` over the seeds that both have, with a t interval; None if they share none."""
    seeds = sorted(values.keys() & reference.keys())
    return mean_interval([values[s] - reference[s] for s in seeds]) if seeds else None


def needed_fraction(fractions: Sequence[float], accuracies: Sequence[float], wanted: float) -> float:
    """The share of data at which a learning curve reaches an accuracy.

    The curve is made monotone (the best mean up to each share) and is a line between shares in the logarithm of the
    data.

    Returns:
        The share; the smallest one if that is enough, infinity if the largest is not.
    """
    x, y = np.log(np.asarray(fractions, dtype=np.float64)), np.maximum.accumulate(np.asarray(accuracies))
    if wanted <= y[0]:
        return float(fractions[0])
    if wanted > y[-1]:
        return math.inf
    right = int(np.searchsorted(y, wanted))
    share = (wanted - y[right - 1]) / (y[right] - y[right - 1])
    return float(np.exp(x[right - 1] + share * (x[right] - x[right - 1])))


def data_ratio(
    fractions: Sequence[float], ours: np.ndarray, theirs: np.ndarray, at: int, *, seed: int = 0
) -> tuple[float, float, float]:
    """How much of their data we need for their accuracy at one share: below 1 is a saving.

    Args:
        fractions: shares of the data, rising ``[F]``.
        ours, theirs: accuracies ``[seeds, F]`` of runs paired by seed.
        at: index of the share at which their accuracy is the goal.
        seed: of the bootstrap, which draws seeds with replacement.

    Returns:
        The ratio of the means, and the 2.5% and 97.5% quantiles of the bootstrap's.
    """
    random = np.random.default_rng(seed)

    def ratio(rows: np.ndarray) -> float:
        goal = float(theirs[rows, at].mean())
        return needed_fraction(fractions, ours[rows].mean(0), goal) / fractions[at]

    count = len(ours)
    draws = [ratio(random.integers(count, size=count)) for _ in range(BOOTSTRAPS)]
    low, high = (float(np.quantile(draws, level, method="nearest")) for level in (0.025, 0.975))
    return ratio(np.arange(count)), low, high
