"""The page of results: its tables are made from the stored runs, and its text says what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pandas
import pytest

from experiments.__main__ import RESULTS, STUDIES, main
from experiments.collect import known_runs, searched
from experiments.overall import GROUPS
from experiments.statistics import mean_interval
from experiments.study import load_study
from experiments.tests.conftest import needs_a_folder

DOCS = Path(__file__).parents[2] / "docs" / "results"
PAGE = (DOCS / "experiments.md").read_text(encoding="utf-8")
SEARCHED = {path.stem for path in STUDIES.glob("*.yaml") if needs_a_folder(path)}
"""Studies on data of the user's, run with --search-seeds; they are on the page once they have a table."""
NAMES = sorted(
    path.stem
    for path in STUDIES.glob("*.yaml")
    if path.stem not in SEARCHED or (RESULTS / f"{path.stem}.csv").is_file()
)

NUMBER = r"\d+\.\d+"
DIFFERENCE = re.compile(rf"({NUMBER}) ± ({NUMBER})")
RATIO = re.compile(rf"({NUMBER}) \(({NUMBER}) to ({NUMBER})\)")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every study's Markdown, made again."""
    folder = tmp_path_factory.mktemp("report")
    assert main(["report", "--into", str(folder)]) == 0
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}


def is_rounded(told: tuple[str, ...], exact: tuple[str, ...]) -> bool:
    """Whether numbers are others, to the digits that they are told with."""
    return all(
        abs(float(a) - float(b)) <= 0.501 * 10.0 ** -len(a.partition(".")[2]) for a, b in zip(told, exact, strict=True)
    )


def test_every_study_is_reported(reports: dict[str, str]) -> None:
    assert sorted(reports) == sorted([*NAMES, "overall"])


def test_every_run_of_every_study_is_stored(tmp_path: Path) -> None:
    known = known_runs(RESULTS)
    for name in NAMES:
        if name == "theory":
            continue
        study = load_study(STUDIES / f"{name}.yaml")
        chosen = searched(study, tmp_path, RESULTS) if name in SEARCHED else study
        settings = [{(arm, run.fraction) for arm, run in of.runs()} for of in (study, chosen)]
        assert settings[0] == settings[1], f"{name}: an arm has no run"
        assert [run for _, run in chosen.runs() if run.id not in known] == []


@pytest.mark.parametrize("study", [*NAMES, "overall"])
def test_the_tables_are_those_of_the_stored_runs(reports: dict[str, str], study: str) -> None:
    assert (DOCS / "experiments" / f"{study}.md").read_text(encoding="utf-8") == reports[study]


def test_the_page_compares_photos_at_one_rate_for_both() -> None:
    (told,) = re.findall(r"minus DoRA is (\S+) points \(1e-3\) and (\S+) \(3e-3\), minus LoRA (\S+) and (\S+),", PAGE)
    tables = [pandas.read_csv(RESULTS / f"{name}.csv") for name in GROUPS["photos"]]
    differences = []
    for reference in ("dora", "lora"):
        for rate in (1e-3, 3e-3):
            by_task = []
            for table in tables:
                own = table[table.rate == rate].pivot_table("test_accuracy", "seed", ["arm", "fraction"])
                by_task.append((own["doran"] - own[reference]).mean(axis=1))
            differences.append(mean_interval(100 * sum(by_task) / len(by_task)))
    assert [f"{difference.value:+.2f}" for difference in differences] == list(told)
    assert not any(difference.excludes_zero for difference in differences)


def test_models_are_not_compared_as_methods_are(reports: dict[str, str]) -> None:
    assert "| minus lora, points |" in reports["commonsense_gemma3"]
    assert ", points |" not in reports["commonsense_full"]


def test_a_study_names_the_arms_whose_seeds_did_not_all_try_every_rate(reports: dict[str, str]) -> None:
    assert " Of full, some seeds tried every rate" in reports["flowers"]
    assert " Of lora, doran, dora, " in reports["commonsense_smollm2"]
    assert "some seeds tried every rate" not in reports["digits"]


def test_studies_of_the_old_start_alone_say_so(reports: dict[str, str]) -> None:
    told = {name for name, report in reports.items() if "**Old start**" in report}
    assert told == {"tau", "tau_init"}


@pytest.mark.parametrize("study", NAMES)
def test_the_page_tells_how_many_runs_there_are(study: str) -> None:
    (line,) = re.findall(rf"^- \[{study}\]\(.*?(?=^- |^$)", PAGE, re.MULTILINE | re.DOTALL)
    count = len(pandas.read_csv(RESULTS / f"{study}.csv"))
    assert re.search(rf"\b{count:,} (runs|fits)", line)


@pytest.mark.parametrize("pattern", [DIFFERENCE, RATIO])
def test_every_interval_of_the_page_is_in_a_table(reports: dict[str, str], pattern: re.Pattern[str]) -> None:
    exact = [numbers for report in reports.values() for numbers in pattern.findall(report)]
    told = pattern.findall(PAGE)
    assert len(told) >= 4
    # A difference may be told the other way round: the sign is not compared.
    assert [numbers for numbers in told if not any(is_rounded(numbers, other) for other in exact)] == []
