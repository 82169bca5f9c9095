"""Subsets and batches: nested, even, complete, and apart from the test."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.data import Examples, Split, batches_of, bucket_schedule, subset
from experiments.digits import digits_split
from experiments.errors import ExperimentError


@pytest.fixture(scope="module")
def texts() -> Split:
    random = torch.Generator().manual_seed(0)

    def examples(count: int) -> Examples:
        lengths = torch.randint(5, 60, (count,), generator=random)
        return Examples(
            torch.zeros(count, 60, dtype=torch.long), lengths, torch.randint(0, 2, (count,), generator=random)
        )

    return Split.of(examples(1000), examples(10), examples(10))


def test_smaller_subsets_are_within_larger_ones_and_even(texts: Split) -> None:
    sizes = {fraction: subset(texts, fraction, seed=3) for fraction in (0.04, 0.1, 0.5, 1.0)}
    assert [len(indices) for indices in sizes.values()] == [40, 100, 500, 1000]
    assert set(sizes[0.04]) < set(sizes[0.1]) < set(sizes[0.5]) < set(sizes[1.0])
    for fraction, indices in sizes.items():
        for bucket in range(4):
            for label in range(2):
                stratum = (texts.bucket == bucket) & (texts.train.labels.numpy() == label)
                assert abs(stratum[indices].sum() - fraction * stratum.sum()) <= 1
    assert set(subset(texts, 0.1, seed=4)) != set(sizes[0.1])


def test_batches_stay_in_their_bucket_and_repeat_an_example_only_after_the_others(texts: Split) -> None:
    indices = subset(texts, 0.1, seed=0)
    order = batches_of(texts, indices, steps=50, batch=8, seed=0)
    schedule = bucket_schedule(4, 50)
    for step, batch in enumerate(order):
        assert (texts.bucket[batch] == schedule[step]).all()
        assert int(texts.train.lengths[batch].max()) <= texts.longest[schedule[step]]  # type: ignore[index]
    counts = np.bincount(order.ravel(), minlength=1000)
    assert set(np.flatnonzero(counts)) <= set(indices)
    for bucket in range(4):
        own = counts[indices[texts.bucket[indices] == bucket]]
        assert own.max() - own.min() <= 1


def test_a_subset_without_a_bucket_is_refused(texts: Split) -> None:
    with pytest.raises(ExperimentError, match=r"leave none in length bucket"):
        batches_of(texts, np.flatnonzero(texts.bucket == 1)[:3], steps=8, batch=2, seed=0)


def test_digits_are_split_into_disjoint_parts() -> None:
    split = digits_split()
    images = [part.inputs.flatten(1) for part in (split.train, split.validation, split.test)]
    assert [len(part) for part in images] == [1000, 297, 500]
    rows = {tuple(row.tolist()) for part in images for row in part}
    assert len(rows) == 1797  # no digit is there twice
