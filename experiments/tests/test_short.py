"""The road from studies to tables, in the studies' short forms: real models and data, real training."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml

from experiments.__main__ import STUDIES, main
from experiments.collect import KEYS
from experiments.store import Store
from experiments.tests.conftest import needs_a_folder

TRAINED = sorted(path.stem for path in STUDIES.glob("*.yaml") if path.stem != "theory" and not needs_a_folder(path))
"""Studies that need no folder of the user's; test_folders has the others."""
MEASURES = [
    "rank",
    "parameters",
    "validation_accuracy",
    "test_accuracy",
    "first_loss",
    "last_loss",
    "spikes",
    "diverged",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, letters: Path) -> Path:
    """All studies in their short form, in one results folder."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(letters, folder / "models")
    assert main(["run", *TRAINED, "--short", "--out", str(folder), "--device", "cpu"]) == 0
    return folder


def test_a_second_call_runs_nothing(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Store(results).file.read_bytes()
    assert main(["run", *TRAINED, "--short", "--out", str(results), "--device", "cpu"]) == 0
    assert "0 runs made, 0 left" in capsys.readouterr().out
    assert Store(results).file.read_bytes() == before


@pytest.mark.parametrize(("study", "kept"), [("digits", ["tau"]), ("sharing", ["tau", "spectra"])])
def test_a_table_stands_in_for_the_folder_that_it_came_from(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], study: str, kept: list[str]
) -> None:
    tables, empty = tmp_path / "tables", tmp_path / "empty"
    main(["collect", study, "--short", "--results", str(results), "--into", str(tables)])
    files = [tables / f"{study}.{name}.parquet" for name in kept]
    before = [pandas.read_csv(tables / f"{study}.csv"), *map(pandas.read_parquet, files)]
    assert all(len(table) for table in before)
    assert main(["run", study, "--short", "--out", str(empty), "--device", "cpu", "--known", str(tables)]) == 0
    assert "0 runs made, 0 left" in capsys.readouterr().out
    main(["collect", study, "--short", "--results", str(empty), "--into", str(tables)])
    after = [pandas.read_csv(tables / f"{study}.csv"), *map(pandas.read_parquet, files)]
    for one, other in zip(before, after, strict=True):
        pandas.testing.assert_frame_equal(one, other, check_dtype=False)


@pytest.mark.parametrize("study", TRAINED)
def test_each_study_has_its_tidy_table_and_report(results: Path, tmp_path: Path, study: str) -> None:
    assert main(["collect", study, "--short", "--results", str(results), "--into", str(tmp_path)]) == 0
    table = pandas.read_csv(tmp_path / f"{study}.csv")
    assert table.columns.tolist()[: len(KEYS)] == KEYS
    assert set(MEASURES) <= set(table.columns)
    assert table.id.is_unique
    assert table.test_accuracy.between(0, 1).all()
    assert main(["report", study, "--tables", str(tmp_path), "--into", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / f"{study}.md").read_text(encoding="utf-8")
    for arm in table.arm.unique():
        assert f"| {arm} |" in page
    assert (tmp_path / "page" / f"{study}-rates.svg").stat().st_size > 1000
    assert ("## Spikes of the loss per run" in page) == (study in ("tau", "tau_init"))
    assert (f"({study}-spectra.svg)" in page) == (study == "sharing")
    has_tau = bool((table.tau_start > 0).any()) if "tau_start" in table else False
    assert ("## The gradient's split" in page) == has_tau
    assert (f"({study}-split.svg)" in page) == (has_tau and "doran" in set(table.arm))


def test_the_spectra_are_those_of_the_factors(results: Path, tmp_path: Path) -> None:
    main(["collect", "sharing", "--short", "--results", str(results), "--into", str(tmp_path)])
    spectra = pandas.read_parquet(tmp_path / "sharing.spectra.parquet")
    table = pandas.read_csv(tmp_path / "sharing.csv")
    ranks = []
    for _, values in spectra.groupby("layer").value:
        share = (values / values.sum()).to_numpy(dtype=float)
        ranks.append(float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())))
        assert (values.diff().dropna() <= 0).all()
    assert len(ranks) == 12
    assert np.mean(ranks) == pytest.approx(table.effective_rank[0], rel=0.02)


def test_what_was_trained_has_learned(results: Path, tmp_path: Path) -> None:
    main(["collect", "digits", "--short", "--results", str(results), "--into", str(tmp_path)])
    table = pandas.read_csv(tmp_path / "digits.csv")
    accuracy = table.groupby("arm").test_accuracy.mean()
    assert accuracy["head"] > 0.3  # 0.1 by guessing
    assert (accuracy[["lora", "doran", "full"]] > accuracy["head"] + 0.05).all()
    assert (table.last_loss < 0.8 * table.first_loss).all()
    curves = pandas.read_parquet(tmp_path / "digits.tau.parquet")
    assert set(curves.arm) == {"doran"}
    assert (curves.tau > 0).all()
    assert curves.groupby("layer").tau.nunique().min() > 1  # a learned tau moves


def test_a_search_runs_the_other_seeds_at_the_rate_that_it_chose(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(letters, tmp_path / "models")
    study = yaml.safe_load((STUDIES / "digits.yaml").read_text(encoding="utf-8"))
    study |= {"steps": 40, "evaluated": 100, "seeds": 3, "fractions": [1.0], "rates": [1e-6, 8e-3]}
    study |= {"parallel": 4, "arms": {"lora": {}, "head": {}}}
    file = tmp_path / "found.yaml"
    file.write_text(yaml.safe_dump(study), encoding="utf-8")
    arguments = ["run", str(file), "--out", str(tmp_path), "--device", "cpu", "--search-seeds", "2"]
    assert main(arguments) == 0
    assert "10 runs made, 0 left" in capsys.readouterr().out
    assert main(["collect", str(file), "--results", str(tmp_path), "--into", str(tmp_path)]) == 0
    table = pandas.read_csv(tmp_path / "found.csv")
    seeds = {(arm, rate): set(part.seed) for (arm, rate), part in table.groupby(["arm", "rate"])}
    assert seeds == {(arm, rate): {5, 6} | ({7} if rate == 8e-3 else set()) for arm, rate in seeds}
    assert len(seeds) == 4
    assert main(["report", "found", "--tables", str(tmp_path), "--into", str(tmp_path)]) == 0
    assert "the others ran at the rate that these chose" in (tmp_path / "found.md").read_text(encoding="utf-8")
    assert main([*arguments[:-1], "0"]) == 2
    assert "--search-seeds: expected 1 or more, got 0" in capsys.readouterr().err


def test_the_theory_resumes_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["theory", "--short", "--out", str(tmp_path / "fits.jsonl"), "--into", str(tmp_path)]
    assert main(arguments) == 0
    assert "12 fits made, 0 were there" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "0 fits made, 12 were there" in capsys.readouterr().out
    assert main(["report", "theory", "--tables", str(tmp_path), "--into", str(tmp_path)]) == 0
    page = (tmp_path / "theory.md").read_text(encoding="utf-8")
    assert "| shared | 3 | 47 | 3 |" in page
    assert "| separate | 3 | 51 | 3 |" in page


def test_a_study_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "tau", "--results", str(tmp_path), "--into", str(tmp_path)]) == 2
    assert "none of its runs is in" in capsys.readouterr().err
    assert main(["report", "tau", "--tables", str(tmp_path), "--into", str(tmp_path)]) == 2
    assert "tau.csv is not there" in capsys.readouterr().err
