"""Markdown tables of a study, from its tidy table. Intervals are 95% t intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas

from experiments.collect import chosen_rates
from experiments.statistics import Interval, data_ratio, mean_interval, paired_difference

__all__ = [
    "accuracy_by_data",
    "accuracy_by_rate",
    "accuracy_by_test",
    "at_chosen_rates",
    "data_needed",
    "factor_table",
    "gradients",
    "gradients_split",
    "lost_rule",
    "lost_runs",
    "markdown",
    "spikes",
    "summary",
    "tests_of",
]

LOST = 0.1
"""A run is lost when its loss is not finite, or its validation accuracy less than this above chance.

On data of the user's, where a run that learns may stay near chance: when its loss ends above its first value.
"""
_CHANCE = {"minilm": 0.5, "smollm2": 0.5, "vit": 0.1}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def at_chosen_rates(table: pandas.DataFrame) -> pandas.DataFrame:
    """The rows at each arm's and share's rate of best validation accuracy."""
    chosen = chosen_rates(table)
    keep = [chosen[row.arm, row.fraction] == row.rate for row in table.itertuples()]
    return table[keep]


def _by_seed(rows: pandas.DataFrame) -> dict[int, float]:
    return dict(zip(rows.seed.tolist(), (100 * rows.test_accuracy).tolist(), strict=True))


def _show(interval: Interval | None, *, sign: bool = False) -> str:
    if interval is None:
        return ""
    number = f"{interval.value:+.2f}" if sign else f"{interval.value:.2f}"
    return number if np.isnan(interval.half) else f"{number} ± {interval.half:.2f}"


def summary(table: pandas.DataFrame, references: Sequence[str]) -> str:
    """Each arm at its chosen rate on all of its data: test accuracy in percent, and its difference to each reference.

    A rate at the end of the arm's grid has a star: a better one may lie beyond.
    """
    whole = table[table.fraction == table.fraction.max()]
    best = at_chosen_rates(whole)
    bases = {reference: _by_seed(best[best.arm == reference]) for reference in references}
    rows = []
    for arm in table.arm.drop_duplicates():
        own = best[best.arm == arm]
        if own.empty:
            continue
        values = _by_seed(own)
        differences = [None if arm == name else paired_difference(values, base) for name, base in bases.items()]
        rate, grid = own.rate.iloc[0], whole[whole.arm == arm].rate
        star = "*" if rate in (grid.min(), grid.max()) and grid.nunique() > 1 else ""
        rows.append([
            arm, str(own["rank"].iloc[0]), f"{own.parameters.iloc[0]:,}", f"{rate:g}{star}", str(len(own)),
            _show(mean_interval(list(values.values()))), *(_show(difference, sign=True) for difference in differences),
        ])  # fmt: skip
    header = ["arm", "rank", "parameters", "rate", "seeds", "test accuracy, %"]
    return markdown([*header, *(f"minus {name}, points" for name in references)], rows)


def _has_chance(table: pandas.DataFrame) -> bool:
    return bool(table.model.isin(_CHANCE).all())


def lost_rule(table: pandas.DataFrame) -> str:
    """What a lost run of the study is."""
    if _has_chance(table):
        below = f"validation accuracy ends less than {100 * LOST:g} points above chance"
    else:
        below = "it ends above the first loss"
    return f"Lost: the loss is not finite, or {below}."


def lost_runs(table: pandas.DataFrame) -> str:
    """How many runs of each arm and rate were lost."""
    whole = table[table.fraction == table.fraction.max()]
    low = whole.validation_accuracy < whole.model.map(_CHANCE) + LOST if _has_chance(table) else whole.diverged
    lost = whole.last_loss.isna() | low
    return _by_rate(whole.assign(lost=lost), lambda runs: f"{runs.lost.sum()}/{len(runs)}")


def accuracy_by_rate(table: pandas.DataFrame) -> str:
    """Mean test accuracy in percent of each arm and rate on all of the data."""
    whole = table[table.fraction == table.fraction.max()]
    return _by_rate(whole, lambda runs: f"{100 * runs.test_accuracy.mean():.2f}")


def spikes(table: pandas.DataFrame) -> str:
    """Loss spikes per run of each arm and rate."""
    return _by_rate(table[table.fraction == table.fraction.max()], lambda runs: f"{runs.spikes.mean():.1f}")


def gradients(table: pandas.DataFrame) -> str:
    """Largest over median gradient norm of each arm and rate, the median over the runs."""
    whole = table[table.fraction == table.fraction.max()]
    ratio = whole.largest_gradient / whole.median_gradient
    return _by_rate(whole.assign(ratio=ratio), lambda runs: f"{runs.ratio.median():.1f}")


def _by_rate(table: pandas.DataFrame, cell: Callable[[pandas.DataFrame], str]) -> str:
    """A row per arm, a column per rate."""
    cells = {key: cell(runs) for key, runs in table.groupby(["arm", "rate"])}
    rates = sorted(table.rate.unique())
    rows = [[arm, *(cells.get((arm, rate), "") for rate in rates)] for arm in table.arm.drop_duplicates()]
    return markdown(["arm", *(f"{rate:g}" for rate in rates)], rows)


def accuracy_by_data(table: pandas.DataFrame) -> str:
    """Test accuracy in percent at each share of the data, each at the rate chosen for that share."""
    best = at_chosen_rates(table)
    fractions = sorted(table.fraction.unique())
    rows = []
    for arm in table.arm.drop_duplicates():
        own = [best[(best.arm == arm) & (best.fraction == fraction)] for fraction in fractions]
        cells = [_show(mean_interval(list(_by_seed(part).values()))) if len(part) else "" for part in own]
        rows.append([arm, *cells, str(min(len(part) for part in own if len(part)))])
    return markdown(["arm", *(f"{100 * fraction:g}%" for fraction in fractions), "seeds"], rows)


def tests_of(table: pandas.DataFrame) -> list[str]:
    """Names of the tests whose mean the test accuracy is; empty where there is one."""
    suffix = "_accuracy"
    names = [name.removesuffix(suffix) for name in table.columns if name.endswith(suffix)]
    return [name for name in names if name not in ("test", "validation")]


def accuracy_by_test(table: pandas.DataFrame) -> str:
    """Accuracy in percent in each of the tests, on all of the data at the rate chosen for it."""
    best = at_chosen_rates(table[table.fraction == table.fraction.max()])
    names = tests_of(table)
    rows = []
    for arm in table.arm.drop_duplicates():
        own = best[best.arm == arm]
        if len(own):
            cells = [_show(mean_interval((100 * own[f"{name}_accuracy"]).tolist())) for name in names]
            rows.append([arm, str(len(own)), *cells])
    return markdown(["arm", "seeds", *names], rows)


def data_needed(table: pandas.DataFrame, reference: str) -> str:
    """For each arm, how many times the reference's data it needs for the reference's accuracy at each share."""
    best = at_chosen_rates(table)
    fractions = sorted(float(f) for f in table.fraction.unique())
    curves = {
        str(arm): part.pivot_table(index="seed", columns="fraction", values="test_accuracy")
        for arm, part in best.groupby("arm")
    }
    theirs = curves[reference]
    rows = []
    for arm in table.arm.drop_duplicates():
        ours = curves[arm]
        seeds = ours.dropna().index.intersection(theirs.dropna().index)
        if arm == reference or list(ours.columns) != fractions or len(seeds) < 3:
            continue
        cells = []
        for at in range(1, len(fractions)):
            value, low, high = data_ratio(fractions, ours.loc[seeds].to_numpy(), theirs.loc[seeds].to_numpy(), at)
            cells.append(f"{_times(value)} ({_times(low)} to {_times(high)})")
        rows.append([arm, *cells, str(len(seeds))])
    return markdown(["arm", *(f"at {100 * f:g}%" for f in fractions[1:]), "seeds"], rows)


def _times(ratio: float) -> str:
    return "not reached" if np.isinf(ratio) else f"{ratio:.2f}"


def factor_table(table: pandas.DataFrame) -> str:
    """Effective rank of the updates and cosine between layers' updates, at each arm's chosen rate."""
    best = at_chosen_rates(table[table.fraction == table.fraction.max()])
    rows = []
    for arm in table.arm.drop_duplicates():
        own = best[best.arm == arm].dropna(subset=["effective_rank"])
        if len(own):
            spread = [mean_interval(own[name].tolist()) for name in ("effective_rank", "update_similarity")]
            rows.append([arm, str(own["rank"].iloc[0]), str(len(own)), *map(_show, spread)])
    return markdown(["arm", "rank", "seeds", "effective rank", "cosine between layers"], rows)


def gradients_split(curves: pandas.DataFrame) -> str:
    """Shares of the squared gradient along the rows, and of what tau keeps of them, in percent of the whole.

    Each layer's share is the mean over steps and seeds; a row has the smallest, the middle and the largest layer of a
    projection.
    """
    rows = []
    for arm, own in curves.dropna(subset=["along"]).groupby("arm", observed=True):
        by_layer = own.groupby("layer", observed=True)[["along", "kept"]].mean()
        projection = by_layer.index.astype(str).str.rpartition(".").get_level_values(2)
        for name, layers in by_layer.groupby(projection):
            spread = [100 * layers[part].quantile([0, 0.5, 1]) for part in ("along", "kept")]
            shown = [", ".join(f"{value:.2g}" for value in values) for values in spread]
            rows.append([str(arm), str(name), str(len(layers)), *shown])
    return markdown(["arm", "projection", "layers", "along the rows, %", "kept by tau, %"], rows)
