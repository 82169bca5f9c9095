"""Write a study's tables and figures: ``STUDY.md`` and its SVG files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import yaml

from experiments import figures, tables
from experiments.errors import ExperimentError
from experiments.overall import GROUPS, NEEDED, overall_page
from experiments.statistics import Interval, mean_interval

__all__ = ["shared_against_separate", "slopes", "write_report"]

STUDIES = Path(__file__).parent / "studies"
THEORY = "theory"


def write_report(names: Sequence[str], folder: Path, into: Path) -> list[Path]:
    """Report studies from the tables in ``folder``, all of them if none is named; with the needed ones, the overall.

    Returns:
        The Markdown files.

    Raises:
        ExperimentError: a study has no table there.
    """
    names = list(names) or sorted(path.stem for path in folder.glob("*.csv"))
    into.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        source = folder / f"{name}.csv"
        if not source.is_file():
            raise ExperimentError(f"{source} is not there: write it with `python -m experiments collect {name}`")
        table = pandas.read_csv(source, keep_default_na=True)
        text = _theory(table, into) if name == THEORY else _study(name, table, folder, into)
        path = into / f"{name}.md"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    if {*NEEDED} <= {*names}:
        path = into / "overall.md"
        tasks = [name for group in GROUPS.values() for name in group if name in names]
        found = {name: pandas.read_csv(folder / f"{name}.csv", keep_default_na=True) for name in tasks}
        path.write_text(overall_page(found), encoding="utf-8")
        written.append(path)
    return written


def _head(name: str, note: str) -> list[str]:
    return [
        f"# {name}",
        "",
        _settings(name).get("question", name),
        "",
        note,
        "",
        f"    python -m experiments report {name} --into docs/results/experiments",
        "",
    ]


def _settings(name: str) -> dict[str, Any]:
    """The study's YAML; empty for a study without one."""
    file = STUDIES / f"{name}.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _study(name: str, table: pandas.DataFrame, folder: Path, into: Path) -> str:
    arms = table.arm.drop_duplicates().tolist()
    reference = next((arm for arm in arms if arm.startswith("lora")), arms[0])
    own = next((arm for arm in arms if arm.startswith("doran")), arms[0])
    compares_models = table.method.nunique() == 1 and table.model.nunique() > 1
    references = [] if compares_models else list(dict.fromkeys([reference, own]))
    model, steps, batch = ", ".join(table.model.unique()), table.steps.iloc[0], table.batch.iloc[0]
    devices = ", ".join(sorted(table.device.unique()))
    note = (
        f"{len(table)} runs of {model}, {steps} steps of {batch}, on {devices}. For each arm the rate with the best "
        "mean validation accuracy is chosen; accuracies are of the test part. ± is half a 95% t interval over seeds; "
        "differences are paired by seed. The spread does not include that of the choice of test examples. A star marks "
        "a rate at the end of its grid."
    )
    if searched := _searched(table):
        note += f" Of {', '.join(searched)}, some seeds tried every rate; the others ran at the rate that these chose."
    if _all_old(table):
        note += ' **Old start**: all generators start from N(0, 1) (`generator_init="normal"`), with embeddings of 64.'
    parts = [*_head(name, note), "## At the chosen rate", "", tables.summary(table, references)]
    parts += [f"![accuracy over the learning rate]({figures.plot_rates(table, into / f'{name}-rates.svg').name})", ""]
    if tables.tests_of(table):
        parts += ["## By test", "", "The test accuracy is the mean of these.", "", tables.accuracy_by_test(table)]
    parts += ["## Test accuracy by learning rate, %", "", tables.accuracy_by_rate(table)]
    parts += ["## Lost runs by learning rate", "", tables.lost_rule(table), "", tables.lost_runs(table)]
    if _settings(name).get("stability"):
        text = "A spike is a step whose loss is twice the median of the ten before it and above the first loss."
        parts += ["## Spikes of the loss per run", "", text, "", tables.spikes(table)]
        parts += ["## Largest over median gradient norm of a run", "", "The median over the seeds.", ""]
        parts += [tables.gradients(table)]
    if table.fraction.nunique() > 1:
        figure = figures.plot_data(table, into / f"{name}-data.svg").name
        parts += ["## Over the data", "", tables.accuracy_by_data(table), f"![accuracy over the data]({figure})", ""]
        needed = (
            f"Data needed for {reference}'s accuracy, as a multiple of {reference}'s: below 1 is a saving. In brackets "
            "the 95% bootstrap interval over seeds; arms with fewer than three seeds are left out."
        )
        parts += [needed, "", tables.data_needed(table, reference)]
    if "effective_rank" in table and table.effective_rank.notna().any():
        parts += ["## The factors", "", tables.factor_table(table)]
        spectra = folder / f"{name}.spectra.parquet"
        if spectra.is_file():
            figure = figures.plot_spectra(pandas.read_parquet(spectra), into / f"{name}-spectra.svg").name
            parts += [f"![singular values of the updates]({figure})", ""]
    parts += _tau(name, folder, into)
    return "\n".join(parts)


def _searched(table: pandas.DataFrame) -> list[str]:
    """The arms that have more seeds at one rate than at another."""
    seeds = (
        table.groupby(["arm", "fraction", "rate"], sort=False).seed.nunique().groupby(["arm", "fraction"], sort=False)
    )
    more = seeds.max() > seeds.min()
    return [str(arm) for arm in more[more].index.get_level_values("arm").drop_duplicates()]


def _all_old(table: pandas.DataFrame) -> bool:
    """Whether the study has generated factors, all with the old start."""
    starts = table.options.fillna("").str.extract(r"generator_init=(\w+)")[0].dropna()
    return len(starts) > 0 and bool((starts == "normal").all())


def _tau(name: str, folder: Path, into: Path) -> list[str]:
    file = folder / f"{name}.tau.parquet"
    if not file.is_file():
        return []
    curves = pandas.read_parquet(file)
    rows = []
    for arm, own in curves.groupby("arm", observed=True):
        first, last = own[own.step == own.step.min()], own[own.step == own.step.max()]
        change = (last.tau / last.norm).to_numpy() / (first.tau / first.norm).to_numpy()
        by_seed = last.assign(change=change).groupby("seed").change.mean()
        interval = mean_interval(by_seed.tolist())
        rows.append([
            str(arm), f"{own.rate.iloc[0]:g}", str(interval.count), f"{(first.tau / first.norm).mean():.4f}",
            f"{(last.tau / last.norm).mean():.4f}", f"{change.min():.2f} to {change.max():.2f}",
            f"{interval.value:.3f} ± {interval.half:.3f}",
        ])  # fmt: skip
    header = ["arm", "rate", "seeds", "tau / norm, first", "last", "factor of change, over layers and seeds", "mean"]
    parts = ["## tau", "", tables.markdown(header, rows)]
    moving = [
        str(arm)
        for arm, own in curves.groupby("arm", observed=True)
        if own.groupby("layer", observed=True).tau.std().max() > 0
    ]
    for arm in [arm for arm in ("doran", "block", "leaky_relu", "relative_0.1") if arm in moving][:1]:
        figure = figures.plot_tau(curves, arm, into / f"{name}-tau.svg").name
        parts += [f"![tau of {arm}]({figure})", ""]
    if "along" in curves and curves.along.notna().any():
        text = (
            "The share of a layer's squared gradient that runs along the rows of its weight, where DoRA's output does "
            "not change, and the part of it that reaches the factors through tau, both in percent of the whole. Each "
            "layer has its mean over steps and seeds; shown are the smallest, the middle and the largest layer."
        )
        parts += ["## The gradient's split", "", text, "", tables.gradients_split(curves)]
        if "doran" in moving:
            figure = figures.plot_split(curves, "doran", into / f"{name}-split.svg").name
            parts += [f"![the gradient's split of doran]({figure})", ""]
    return parts


def slopes(table: pandas.DataFrame, name: str) -> pandas.DataFrame:
    """Slope of ``log error`` over ``log samples`` for each family and number of experts, one per seed."""
    rows = []
    for (family, fitted, seed), part in table.groupby(["family", "fitted_experts", "seed"]):
        slope = np.polyfit(np.log(part.samples), np.log(part[name].clip(lower=1e-12)), 1)[0]
        rows.append({"family": family, "fitted_experts": fitted, "seed": seed, "slope": slope})
    return pandas.DataFrame(rows)


def _theory(table: pandas.DataFrame, into: Path) -> str:
    # A seed counts when it has all sizes.
    full = table.groupby(["family", "fitted_experts", "seed"]).samples.transform("size") == table.samples.nunique()
    table = table[full]
    note = (
        f"{len(table)} fits on a CPU. ± is half a 95% t interval over seeds (truth, data and start); errors at the "
        "most samples are medians."
    )
    rows = []
    for (family, fitted), part in table.groupby(["family", "fitted_experts"]):
        cells = []
        for name in ("function_error", "factor_error"):
            own = slopes(part, name)
            interval = mean_interval(own.slope.tolist())
            last = part[part.samples == part.samples.max()][name].median()
            cells += [f"{interval.value:.2f} ± {interval.half:.2f}", f"{last:.3g}"]
        met = part.converged.mean()
        rows.append(
            [str(family), str(fitted), str(part.parameters.iloc[0]), str(part.seed.nunique()), *cells, f"{met:.0%}"]
        )
    at = f"error at n = {table.samples.max()}"
    header = [
        "factors", "experts fitted", "parameters", "seeds", "slope of the function's error", at,
        "slope of the factors' error", at, "converged",
    ]  # fmt: skip
    figure = figures.plot_theory(table, into / "theory.svg").name
    parts = [*_head(THEORY, note), tables.markdown(header, rows), f"![errors over samples]({figure})", ""]
    pairing = (
        "Paired by seed. An error's ratio is the geometric mean over seeds and samples, with its 95% t interval over "
        "seeds: below 1, shared factors have the smaller error."
    )
    return "\n".join([*parts, "## Shared against separate factors", "", pairing, "", shared_against_separate(table)])


def shared_against_separate(table: pandas.DataFrame) -> str:
    """Errors of shared factors over those of separate ones, and differences of their slopes, paired by seed."""
    rows = []
    for fitted, part in table.groupby("fitted_experts"):
        cells = [str(fitted), str(part.seed.nunique())]
        for name in ("function_error", "factor_error"):
            ratio = _paired(part.assign(value=np.log(part[name])))
            slope = _paired(slopes(part, name).rename(columns={"slope": "value"}))
            value, low, high = np.exp([ratio.value, ratio.low, ratio.high])
            cells += [f"{value:.2f} ({low:.2f} to {high:.2f})", f"{slope.value:+.2f} ± {slope.half:.2f}"]
        rows.append(cells)
    header = ["experts fitted", "seeds"]
    for name in ("function", "factors"):
        header += [f"error of the {name}, ratio", "difference of the slopes"]
    return tables.markdown(header, rows)


def _paired(table: pandas.DataFrame) -> Interval:
    """Shared minus separate of each seed's mean value."""
    means = table.pivot_table(index="seed", columns="family", values="value").dropna()
    return mean_interval((means.shared - means.separate).tolist())


def theory_table(lines: Path, into: Path) -> Path:
    """``theory.csv`` from the simulation's JSON lines."""
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    into.mkdir(parents=True, exist_ok=True)
    path = into / f"{THEORY}.csv"
    pandas.DataFrame(rows).to_csv(path, index=False)
    return path
