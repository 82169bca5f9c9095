"""What a proof accepts and what it does not, on answers made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from doran_export import ProofError
from doran_export.graph.precision import PRECISIONS
from doran_export.graph.spec import GraphSpec
from doran_export.proof.cases import Case
from doran_export.proof.checks import Check, averages, compare, require_average, require_certain
from doran_export.proof.greedy import compare_greedy
from doran_export.proof.reference import Answer, Greedy
from doran_export.tasks import TASKS

SPEC = GraphSpec(TASKS["text-classification"], {}, {}, None, 9, 0, 16)
EXPECTED = np.array([[1.0, -1.0], [0.5, 2.0], [-3.0, 3.0], [0.0, 1.0], [2.0, 1.0]], np.float32)


class Fixed:
    """Stands in for OnnxRunner: gives what PyTorch gave, plus an error of each row."""

    adapter = None

    def __init__(self, *errors: float) -> None:
        self.errors = np.array(errors, np.float32)[:, None] * np.array([[1.0, 0.0]], np.float32)

    def run(self, inputs: object) -> dict[str, np.ndarray]:
        return {"logits": EXPECTED + self.errors}


def check(*errors: float, noise: float = 0.0, precision: str = "fp32", given: bool = True, scale: float = 1.0) -> Check:
    case = Case("case", {"input_ids": np.zeros((5, 3), np.int64)}, given=given)
    answer = Answer(case, {"logits": EXPECTED}, {"logits": np.array([noise, 0, 0, 0, 0], np.float32)})
    runner: Any = Fixed(*errors)
    return compare(runner, SPEC, answer, PRECISIONS[precision], PRECISIONS[precision].tolerance * scale, "cpu")


def test_one_row_beyond_the_tolerance() -> None:
    assert check(0, 0, 0, 0, 0.9e-3).max_difference["logits"] == pytest.approx(0.9e-3, rel=1e-3)
    with pytest.raises(ProofError, match=r"in logits \(case\) by 0\.0011, more than the allowed 0\.001"):
        check(0, 0, 0, 0, 1.1e-3)


def test_random_inputs_are_judged_by_the_size_of_the_output() -> None:
    rms = float(np.sqrt((EXPECTED**2).mean()))
    assert check(0, 0, 0, 0, 0, given=False).limit["logits"] == pytest.approx(1e-3 * rms)
    with pytest.raises(ProofError):
        check(0, 0, 0, 0, 1.1e-3 * rms, given=False)


def test_an_uncertain_row_is_bounded_by_its_noise() -> None:
    result = check(9e-3, 0, 0, 0, 0, noise=1e-3)
    assert (result.compared, result.uncertain) == ({"logits": 4}, {"logits": 1})
    assert result.max_difference["logits"] == 0
    with pytest.raises(ProofError, match=r"by 0\.012, more than the allowed 0\.011"):
        check(12e-3, 0, 0, 0, 0, noise=1e-3)


def test_each_output_keeps_enough_certain_rows() -> None:
    result = check(0, 0, 0, 0, 0, noise=1e-3)
    require_certain([result], 1e-3)
    two = replace(result, compared={"logits": 99, "embedding": 3}, uncertain={"logits": 0, "embedding": 1})
    with pytest.raises(ProofError, match="only 3 of 4 rows of embedding"):
        require_certain([two], 1e-3)
    other = replace(result, adapter="one", compared={"logits": 3}, uncertain={"logits": 1})
    with pytest.raises(ProofError, match="3 of 4 rows of logits with adapter one"):
        require_certain([result, other], 1e-3)


def test_an_average_is_not_diluted() -> None:
    good = check(0, 0, 0, 0, 0, precision="int8")
    bad = check(3, 3, 3, 3, 3, precision="int8")
    require_average([good], 0.3)
    for group in ({"provider": "cuda"}, {"adapter": "one"}, {"chunked": True}, {"given": False}):
        checks = [*[good] * 50, replace(bad, **group)]  # type: ignore[arg-type]
        assert len(averages(checks)) == 2
        with pytest.raises(ProofError, match=r"of its spread on average, more than the allowed 0\.3"):
            require_average(checks, 0.3)


STEPS = 8
TOKENS = np.arange(2 * STEPS).reshape(2, STEPS)


def greedy(*rows: list[int], margin: float = 1.0, precision: str = "fp32", ends: frozenset[int] = frozenset()) -> Any:
    prompts = {"input_ids": np.ones((2, 1), np.int64), "attention_mask": np.ones((2, 1), np.int64)}
    expected = Greedy(prompts, TOKENS, np.full(TOKENS.shape, margin, np.float32), scale=1.0)
    got = [np.array(row) for row in rows]
    record = PRECISIONS[precision]
    return compare_greedy(got, expected, record, record.tolerance, provider="cpu", end_tokens=ends)


def test_greedy_tokens() -> None:
    first, second = TOKENS.tolist()
    same = greedy(first, second)
    assert (same.identical, same.compared) == (2, 16)
    changed = [*second[:5], 99, *second[6:]]
    with pytest.raises(ProofError, match=r"at step 5 of prompt 1, where PyTorch's best token leads by 1 "):
        greedy(first, changed)
    tie = greedy(first, changed, margin=1e-3)
    assert (tie.identical, tie.ties, tie.compared) == (1, [5], 13)
    assert greedy(first, changed, precision="int8").departures == [5]


def test_a_generator_that_stops_early_proves_what_it_gave() -> None:
    first, second = TOKENS.tolist()
    stopped = greedy(first, second[:4], ends=frozenset({second[3]}))
    assert (stopped.identical, stopped.ended, stopped.compared) == (1, [4], 12)
    with pytest.raises(ProofError, match="stopped after 4 tokens of prompt 1, without an end token"):
        greedy(first, second[:4])
    with pytest.raises(ProofError, match="stopped after 0 tokens"):
        greedy(first, [], ends=frozenset({0}))


def test_ties_must_leave_something() -> None:
    with pytest.raises(ProofError, match="could be compared for only 2 of 16"):
        greedy([0, 99, *range(6)], [8, 99, *range(6)], margin=1e-3)
