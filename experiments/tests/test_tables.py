"""Tables against numbers worked out by hand."""

from __future__ import annotations

import pandas
import pytest

from experiments import tables
from experiments.report import shared_against_separate


@pytest.fixture
def runs() -> pandas.DataFrame:
    """Two arms, three rates, two seeds; the second arm is best at its highest rate."""
    rows = []
    for arm, accuracies in {"lora": [0.80, 0.84, 0.60], "doran": [0.70, 0.80, 0.82]}.items():
        for rate, accuracy in zip([1e-3, 2e-3, 4e-3], accuracies, strict=True):
            for seed in range(2):
                lost = arm == "lora" and rate == 4e-3 and seed == 1
                rows.append({
                    "arm": arm, "model": "minilm", "rate": rate, "seed": seed, "fraction": 1.0, "rank": 8,
                    "parameters": 1000, "validation_accuracy": 0.5 if lost else accuracy,
                    "test_accuracy": accuracy + 0.01 * seed, "last_loss": 0.4, "spikes": 2 * seed,
                    "largest_gradient": 6.0 * (1 + seed), "median_gradient": 2.0,
                })  # fmt: skip
    return pandas.DataFrame(rows)


def test_the_summary_stars_a_rate_at_the_end_of_its_grid_and_pairs_by_seed(runs: pandas.DataFrame) -> None:
    lines = tables.summary(runs, ["lora", "doran"]).splitlines()
    assert lines[0].endswith("| minus lora, points | minus doran, points |")
    assert lines[2].startswith("| lora | 8 | 1,000 | 0.002 | 2 | 84.50 ± 6.35 |  | +2.00 ± 0.00 |")
    assert lines[3].startswith("| doran | 8 | 1,000 | 0.004* | 2 | 82.50 ± 6.35 | -2.00 ± 0.00 |  |")


def test_cells_by_rate(runs: pandas.DataFrame) -> None:
    assert "| lora | 80.50 | 84.50 | 60.50 |" in tables.accuracy_by_rate(runs)
    assert "| lora | 0/2 | 0/2 | 1/2 |" in tables.lost_runs(runs)
    assert "| doran | 1.0 | 1.0 | 1.0 |" in tables.spikes(runs)
    assert "| doran | 4.5 | 4.5 | 4.5 |" in tables.gradients(runs)  # the median of 3 and 6
    fewer = runs[~((runs.arm == "doran") & (runs.rate == 1e-3))]
    assert "| doran |  | 80.50 | 82.50 |" in tables.accuracy_by_rate(fewer)


def test_shared_and_separate_factors_are_paired_by_seed() -> None:
    rows = []
    for family, factor, slope in (("shared", 1.0, -1.0), ("separate", 4.0, -0.5)):
        for seed in range(3):
            for samples in (100, 400):
                error = factor * (1 + seed) * (samples / 200) ** slope  # 200 is the geometric mean of the sizes
                rows.append({
                    "family": family, "fitted_experts": 4, "seed": seed, "samples": samples,
                    "function_error": error, "factor_error": error**2,
                })  # fmt: skip
    line = shared_against_separate(pandas.DataFrame(rows)).splitlines()[2]
    assert line == "| 4 | 3 | 0.25 (0.25 to 0.25) | -0.50 ± 0.00 | 0.06 (0.06 to 0.06) | -1.00 ± 0.00 |"


def test_runs_on_data_of_the_users_are_lost_when_their_loss_rises(runs: pandas.DataFrame) -> None:
    own = runs.assign(model="gemma3/commonsense", diverged=(runs.rate == 4e-3) & (runs.seed == 0))
    assert "| lora | 0/2 | 0/2 | 1/2 |" in tables.lost_runs(own)
    assert "| doran | 0/2 | 0/2 | 1/2 |" in tables.lost_runs(own)
    assert tables.lost_rule(own).endswith("or it ends above the first loss.")
    assert tables.lost_rule(runs).endswith("less than 10 points above chance.")


def test_an_arm_without_some_shares_of_the_data_has_its_seeds_told(runs: pandas.DataFrame) -> None:
    small = runs[runs.arm == "lora"].assign(fraction=0.1)
    lines = tables.accuracy_by_data(pandas.concat([runs, small])).splitlines()
    assert lines[2] == "| lora | 84.50 ± 6.35 | 84.50 ± 6.35 | 2 |"
    assert lines[3] == "| doran |  | 82.50 ± 6.35 | 2 |"


def test_the_gradients_split_by_projection() -> None:
    rows = [
        {
            "arm": "doran",
            "seed": seed,
            "step": step,
            "layer": f"layers.{block}.q_proj",
            "along": along,
            "kept": 0.1 * along,
        }
        for block, share in enumerate((0.01, 0.02, 0.06))
        for seed in range(2)
        for step, along in ((0, share), (10, 3 * share), (20, float("nan")))
    ]
    table = tables.gradients_split(pandas.DataFrame(rows))
    assert "| doran | q_proj | 3 | 2, 4, 12 | 0.2, 0.4, 1.2 |" in table


def test_accuracy_by_test(runs: pandas.DataFrame) -> None:
    assert tables.tests_of(runs) == []
    several = runs.assign(piqa_accuracy=runs.test_accuracy - 0.1, boolq_accuracy=0.5)
    assert tables.tests_of(several) == ["piqa", "boolq"]
    lines = tables.accuracy_by_test(several).splitlines()
    assert lines[0] == "| arm | seeds | piqa | boolq |"
    assert lines[2] == "| lora | 2 | 74.50 ± 6.35 | 50.00 ± 0.00 |"
