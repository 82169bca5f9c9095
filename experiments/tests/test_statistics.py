"""Intervals and data ratios against scipy and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from experiments.statistics import data_ratio, mean_interval, needed_fraction, paired_difference


@pytest.mark.parametrize("count", [2, 3, 5, 10, 16])
def test_the_interval_is_scipys(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    low, high = scipy.stats.t.interval(0.95, count - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-3)
    assert interval.half == pytest.approx((high - low) / 2, rel=1e-3)


def test_one_value_has_no_interval_and_none_is_refused() -> None:
    assert math.isnan(mean_interval([1.0]).half)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_a_difference_is_of_the_seeds_that_both_have() -> None:
    difference = paired_difference({0: 3.0, 1: 5.0, 7: 100.0}, {0: 1.0, 1: 1.0, 2: -50.0})
    assert difference is not None
    assert (difference.value, difference.count) == (3.0, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_the_needed_share_is_read_off_a_line_in_log_data() -> None:
    fractions, accuracies = [0.01, 0.1, 1.0], [0.5, 0.7, 0.8]
    assert needed_fraction(fractions, accuracies, 0.6) == pytest.approx(10**-1.5)
    assert needed_fraction(fractions, accuracies, 0.7) == pytest.approx(0.1)
    assert needed_fraction(fractions, accuracies, 0.4) == 0.01
    assert needed_fraction(fractions, accuracies, 0.81) == math.inf
    assert needed_fraction(fractions, [0.5, 0.45, 0.8], 0.5) == 0.01  # a dip is no progress lost


def test_the_same_curve_needs_the_same_data_and_a_shifted_one_a_tenth() -> None:
    fractions = [0.001, 0.01, 0.1, 1.0]
    curve = np.tile([0.5, 0.6, 0.7, 0.8], (5, 1))
    assert data_ratio(fractions, curve, curve, at=2) == pytest.approx((1.0, 1.0, 1.0))
    assert data_ratio(fractions, curve + 0.1, curve, at=2) == pytest.approx((0.1, 0.1, 0.1))


def test_the_bootstrap_interval_holds_the_spread_of_the_seeds() -> None:
    fractions = [0.01, 0.1, 1.0]
    random = np.random.default_rng(1)
    theirs = np.tile([0.5, 0.6, 0.7], (6, 1)) + 0.01 * random.normal(size=(6, 3))
    ours = np.tile([0.5, 0.6, 0.7], (6, 1)) + 0.01 * random.normal(size=(6, 3))
    value, low, high = data_ratio(fractions, ours, theirs, at=1)
    assert low < value < high
    assert low < 1.0 < high
