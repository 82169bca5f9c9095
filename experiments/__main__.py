"""The command: ``python -m experiments run|collect|theory|report|paper ...``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from doran_core.errors import DoranError
from experiments.errors import ExperimentError
from experiments.paper.command import add_arguments, run_command

if TYPE_CHECKING:
    from experiments.study import Study

STUDIES = Path(__file__).parent / "studies"
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; errors of the user's go to stderr in one line, with exit code 2."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.function(args))
    except DoranError as error:
        print(f"experiments: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Run studies and report them.")
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="make the runs of studies that a results folder does not have yet")
    run.add_argument(
        "studies",
        nargs="+",
        help="names in experiments/studies, or YAML files, the most important "
        "first; NAME:ARM+ARM is some arms of a study",
    )
    run.add_argument(
        "--out", type=Path, default=Path("results"), help="results folder; runs that are in it are not made again"
    )
    run.add_argument("--workers", type=int, default=1, help="processes that share the device (default: 1)")
    run.add_argument("--budget", type=float, help="seconds after which to stop; what is missing can be run later")
    run.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    run.add_argument("--known", type=Path, help="folder of tidy tables; the runs in them are not made again either")
    run.add_argument(
        "--search-seeds",
        type=int,
        help="seeds that try every rate; the arms' other seeds are run at the rate that these choose on validation",
    )
    run.add_argument("--data", type=Path, help="folder of the photos or questions of studies that need some")
    run.add_argument("--check", action="store_true", help="say what the studies lack, and run nothing")
    run.add_argument("--short", action="store_true", help="the studies' short form: shows that the road holds")
    run.set_defaults(function=_run)

    collect = commands.add_parser("collect", help="write each study's tidy table from results folders")
    collect.add_argument("studies", nargs="+")
    collect.add_argument("--results", type=Path, nargs="+", required=True, help="results folders of `run`")
    collect.add_argument("--into", type=Path, default=RESULTS, help="folder of the tables")
    collect.add_argument("--short", action="store_true")
    collect.set_defaults(function=_collect)

    theory = commands.add_parser("theory", help="the simulation of the paper's regression setting; resumes")
    theory.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    theory.add_argument("--into", type=Path, help="also write theory.csv into this folder")
    theory.add_argument("--short", action="store_true")
    theory.set_defaults(function=_theory)

    report = commands.add_parser("report", help="tables and figures of the studies, from their tidy tables")
    report.add_argument("studies", nargs="*", help="default: all that have a table")
    report.add_argument("--tables", type=Path, default=RESULTS, help="folder of the tidy tables")
    report.add_argument("--into", type=Path, required=True, help="folder of the Markdown tables and figures")
    report.set_defaults(function=_report)

    paper = commands.add_parser("paper", help="the paper's own benchmarks: what is missing, or run them")
    add_arguments(paper)
    paper.set_defaults(function=run_command)
    return parser


def named_study(name: str, *, short: bool) -> Study:
    """A study by its name or the path of its YAML, with all its arms or those after the colon.

    Raises:
        ExperimentError: no such study, or no such arm of it.
    """
    from experiments.study import load_study

    name, _, arms = name.partition(":")
    path = Path(name) if Path(name).suffix else STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
        raise ExperimentError(f"there is no study {name}; there are {known}")
    study = load_study(path, short=short)
    return study.only(arms.split("+")) if arms else study


def _run(args: argparse.Namespace) -> int:
    import torch

    from experiments.collect import known_runs, searched
    from experiments.runner import run_studies

    known = known_runs(args.known) if args.known else set()
    studies = [named_study(name, short=args.short) for name in args.studies]
    if args.check:
        return _check(studies, args.data)
    if args.search_seeds is not None and args.search_seeds < 1:
        raise ExperimentError(f"--search-seeds: expected 1 or more, got {args.search_seeds}")
    started = time.monotonic()

    def run(wanted: Sequence[Study]) -> tuple[int, int]:
        return run_studies(
            wanted,
            args.out,
            workers=args.workers,
            budget=None if args.budget is None else args.budget - (time.monotonic() - started),
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            known=known,
            data=args.data,
        )

    if args.search_seeds is None:
        done, left = run(studies)
    else:
        done, left = run([study.first_seeds(args.search_seeds) for study in studies])
        if left == 0:
            more, left = run([searched(study, args.out, args.known) for study in studies])
            done += more
    print(f"{done} runs made, {left} left")
    return 0


def _check(studies: Sequence[Study], data: Path | None) -> int:
    """Print a line for each model with its data that is not there."""
    from experiments.tasks import require

    lacks = 0
    for model in sorted({run.model for study in studies for _, run in study.runs()}):
        try:
            require(model, data)
        except ExperimentError as error:
            lacks += 1
            print(f"{model}: {error}")
    print("nothing is missing" if lacks == 0 else f"{lacks} missing")
    return 1 if lacks else 0


def _collect(args: argparse.Namespace) -> int:
    from experiments.collect import collect

    for name in args.studies:
        print(collect(named_study(name, short=args.short), args.results, args.into))
    return 0


def _theory(args: argparse.Namespace) -> int:
    from experiments.report import theory_table
    from experiments.theory import load_setting, run_theory

    made, known = run_theory(load_setting(STUDIES / "theory.yaml", short=args.short), args.out)
    print(f"{made} fits made, {known} were there")
    if args.into:
        print(theory_table(args.out, args.into))
    return 0


def _report(args: argparse.Namespace) -> int:
    from experiments.report import write_report

    for path in write_report(args.studies, args.tables, args.into):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
