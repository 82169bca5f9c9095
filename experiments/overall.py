"""The methods over several tasks at once: each against LoRA and DoRA, setting by setting and in the mean over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas

from experiments.statistics import mean_interval
from experiments.tables import at_chosen_rates, markdown

__all__ = ["GROUPS", "NEEDED", "overall_page"]

GROUPS = {
    "texts and digits": ("sample_efficiency", "smollm2", "digits"),
    "photos": ("flowers", "textures", "cifar"),
    "commonsense questions": ("commonsense_smollm2", "commonsense_gemma3"),
}
"""Studies with the same methods, by what they are about. Each counts once in a mean, whatever its number of shares."""
NEEDED = GROUPS["texts and digits"]
"""The page needs these; the other studies, on data of the user's, count as soon as they have a table."""
_NOT_LEARNED = GROUPS["commonsense questions"]
"""No method learns these, so they pull a mean towards zero and say nothing."""
_REFERENCES = ("lora", "dora")
_LEFT_OUT = ("head", "full")


def overall_page(tables: Mapping[str, pandas.DataFrame]) -> str:
    """Markdown of the page.

    Args:
        tables: the tidy table of each of :data:`NEEDED`, and of the other studies of :data:`GROUPS` that have one.
    """
    accuracy = {name: _accuracy(table) for name, table in tables.items()}
    arms = [arm for arm in tables[NEEDED[0]].arm.drop_duplicates() if arm not in _LEFT_OUT]
    tasks = ", ".join(f"[{name}]({name}.md)" for name in tables)
    note = (
        "Differences of test accuracy in points, each method at its rate by validation, paired by seed; ± is half a "
        "95% t interval over seeds, whose number is in brackets. "
        f"The tasks are {tasks}; in a mean over tasks each counts once, and a seed counts that has all settings. "
        "Written with the tables of these studies:"
    )
    parts = [
        "# overall",
        "",
        "Are the methods better than LoRA and DoRA at equal numbers of parameters, over all tasks?",
        "",
        note,
        "",
        "    python -m experiments report --into docs/results/experiments",
        "",
    ]
    for reference in _REFERENCES:
        others = [arm for arm in arms if arm != reference]
        parts += [f"## Minus {reference}, mean over tasks", "", _mean_over_tasks(accuracy, others, reference)]
        parts += [f"## Minus {reference}, by setting", "", _by_setting(accuracy, others, reference)]
    return "\n".join(parts)


def _accuracy(table: pandas.DataFrame) -> pandas.DataFrame:
    """Test accuracy in percent at the chosen rates: a row per seed, columns ``(arm, share)``."""
    best = at_chosen_rates(table)
    return 100 * best.pivot_table(index="seed", columns=["arm", "fraction"], values="test_accuracy")


def _difference(accuracy: pandas.DataFrame, arm: str, reference: str) -> pandas.DataFrame:
    """By seed and share; only seeds that both have, and none where the task has no such arm."""
    if arm not in accuracy:
        return pandas.DataFrame(columns=accuracy[reference].columns, dtype=float)
    return (accuracy[arm] - accuracy[reference]).dropna(how="all")


def _mean_over_tasks(accuracy: Mapping[str, pandas.DataFrame], arms: Sequence[str], reference: str) -> str:
    """A row for each group that has a table, one for the tasks that are learned, and one for all."""
    groups = {group: [name for name in names if name in accuracy] for group, names in GROUPS.items()}
    rows = []
    learned = [name for name in accuracy if name not in _NOT_LEARNED]
    for group, names in {**groups, "all but questions": learned, "all": [*accuracy]}.items():
        if not names:
            continue
        cells = []
        for arm in arms:
            by_task = [_difference(accuracy[name], arm, reference).mean(axis=1, skipna=False) for name in names]
            by_seed = pandas.concat(by_task, axis=1).dropna().mean(axis=1)
            cells.append(f"{_shown(by_seed)} ({len(by_seed)})" if len(by_seed) else "")
        rows.append([group, *cells])
    return markdown(["tasks", *arms], rows)


def _by_setting(accuracy: Mapping[str, pandas.DataFrame], arms: Sequence[str], reference: str) -> str:
    rows = []
    for name, table in accuracy.items():
        for share in sorted(table[reference].columns):
            differences = [_difference(table, arm, reference)[share].dropna() for arm in arms]
            rows.append([f"{name}, {100 * share:g}%", *map(_shown, differences)])
    return markdown(["setting", *arms], rows)


def _shown(differences: pandas.Series) -> str:
    if differences.empty:
        return ""
    interval = mean_interval(differences.tolist())
    return f"{interval.value:+.2f} ± {interval.half:.2f}"
