"""The first page's figures show the numbers of the results pages."""

from __future__ import annotations

import sys

import pytest
from places import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs" / "figures"))

from draw import COMPARED, SCHEMES, compared, gained, printed, told


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gains_are_those_of_the_tables(scheme: str) -> None:
    figure = (REPOSITORY / f"docs/figures/gains-{scheme}.svg").read_text(encoding="utf-8")
    bars = [(label, value) for panel in gained().values() for label, value in panel.items()]
    assert len(bars) == 10
    missing = [label for label, value in bars if f">{printed(value)}</text>" not in figure]
    assert not missing, "run docs/figures/draw.py"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_accuracies_are_those_of_the_overall_table(scheme: str) -> None:
    figure = (REPOSITORY / f"docs/figures/accuracy-{scheme}.svg").read_text(encoding="utf-8")
    panels = compared()
    assert len(panels["lora"]) == len(panels["dora"]) >= 10
    assert all(row.keys() == COMPARED.keys() for row in panels["lora"].values())
    assert told(panels) in figure, "run docs/figures/draw.py"
