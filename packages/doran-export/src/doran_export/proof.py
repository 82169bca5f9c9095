"""The proof that an exported directory computes what PyTorch computes: ONNX Runtime against recorded outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from doran_export.errors import ProofError
from doran_export.reference import Answer, Greedy, Reference
from doran_export.runner import OnnxRunner
from doran_export.runtime import available_providers
from doran_export.spec import GraphSpec

__all__ = ["Check", "GreedyCheck", "Proof", "prove"]

_FEWEST_CERTAIN = 0.8  # share of rows that must remain for a comparison to say anything


@dataclass(frozen=True)
class Check:
    """One case on one provider.

    Attributes:
        max_difference: largest absolute difference by output name, padding left out.
        limit: what was allowed by output name: the tolerance, times the output's largest value where that is over 1.
            Random tokens drive some models to activations in the thousands, whose rounding no implementation shares.
        same_argmax: share of rows (or real tokens) whose largest logit is the same one; None without logits.
        compared: number of rows or tokens that were compared.
        uncertain: number of those left out because PyTorch disagrees with itself there, by more than a quarter of the
            tolerance between its two ways to compute attention.
    """

    name: str
    provider: str
    batch: int
    length: int | None
    max_difference: dict[str, float]
    limit: dict[str, float]
    same_argmax: float | None
    compared: int
    uncertain: int


@dataclass(frozen=True)
class GreedyCheck:
    """Greedy generation on one provider.

    Attributes:
        prompts: number of prompts.
        steps: number of tokens generated from each.
        identical: number of prompts whose tokens are all the same.
        ties: for the others, the step at which PyTorch's own two best tokens were nearer than rounding.
    """

    provider: str
    prompts: int
    steps: int
    identical: int
    ties: list[int]


@dataclass(frozen=True)
class Proof:
    """All checks of one directory; every one of them held."""

    tolerance: float
    checks: list[Check]
    greedy: list[GreedyCheck]

    @property
    def max_difference(self) -> float:
        """The largest difference seen."""
        return max(value for check in self.checks for value in check.max_difference.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"max_difference": self.max_difference, **asdict(self)}


def prove(
    directory: Path,
    spec: GraphSpec,
    reference: Reference,
    tolerance: float,
    *,
    providers: Sequence[str] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Proof:
    """Run every case of a reference in ONNX Runtime, on every provider, and compare.

    Args:
        directory: the exported directory.
        spec: its graph.
        reference: what PyTorch answered.
        tolerance: largest allowed difference of any output, in units of its largest value where that is over 1.
        providers: execution providers to run one by one; None takes all that are available.
        advance: called after each case and after each generation.

    Raises:
        ProofError: an output is not finite or differs by more than the tolerance, or greedy tokens differ.
    """
    checks, greedy = [], []
    for provider in providers if providers is not None else available_providers():
        runner = OnnxRunner(directory, providers=[provider])
        for answer in reference.answers:
            check = _compare(runner, spec, answer, tolerance, provider)
            _require_near(check)
            checks.append(check)
            advance()
        _require_certain(checks, tolerance)
        if reference.greedy is not None:
            greedy.append(_compare_greedy(runner, reference.greedy, tolerance, provider))
            advance()
    return Proof(tolerance, checks, greedy)


def _compare(runner: OnnxRunner, spec: GraphSpec, answer: Answer, tolerance: float, provider: str) -> Check:
    case = answer.case
    got = {"logits": runner.run_in_chunks(case.inputs, case.chunks)} if case.chunks else runner.run(case.inputs)
    differences: dict[str, float] = {}
    limits: dict[str, float] = {}
    same: float | None = None
    compared = uncertain = 0
    for name, reference in answer.outputs.items():
        output = got[name].astype(np.float32, copy=False)
        if output.shape != reference.shape:
            raise ProofError(f"{case.name} on {provider}: {name} has shape {output.shape}, expected {reference.shape}")
        rows = np.ones(reference.shape[:-1], dtype=bool)
        if spec.task.per_token and output.ndim == 3:
            rows = case.inputs["attention_mask"].astype(bool)
        if not np.isfinite(output[rows]).all():
            raise ProofError(f"{case.name} on {provider}: {name} is not finite in ONNX Runtime")
        certain = rows & (answer.noise[name] <= tolerance / 4)
        output, reference = output[certain], reference[certain]
        limits[name] = tolerance * max(1.0, float(np.abs(reference).max(initial=0.0)))
        differences[name] = float(np.abs(output - reference).max(initial=0.0))
        compared, uncertain = int(certain.sum()), int((rows & ~certain).sum())
        if name == "logits" and compared:
            same = float((output.argmax(-1) == reference.argmax(-1)).mean())
    return Check(case.name, provider, case.batch, case.length, differences, limits, same, compared, uncertain)


def _require_near(check: Check) -> None:
    for name, difference in check.max_difference.items():
        if difference > check.limit[name]:
            raise ProofError(
                f"ONNX Runtime ({check.provider}) differs from PyTorch by {difference:.3g} in {name} "
                f"({check.name}), more than the allowed {check.limit[name]:.3g}"
            )


def _require_certain(checks: Sequence[Check], tolerance: float) -> None:
    compared = sum(check.compared for check in checks)
    total = compared + sum(check.uncertain for check in checks)
    if compared < _FEWEST_CERTAIN * total:
        raise ProofError(
            f"PyTorch agrees with itself to {tolerance / 4:.3g} on only {compared} of {total} rows: "
            f"a tolerance of {tolerance:.3g} cannot be proven for this model"
        )


def _compare_greedy(runner: OnnxRunner, expected: Greedy, tolerance: float, provider: str) -> GreedyCheck:
    """Compare token by token; after a first difference a row's contexts differ, so that nothing more can be said.

    A difference is forgiven only where PyTorch's own two best logits lie within rounding of each other.
    """
    steps = expected.tokens.shape[1]
    prompts = expected.prompts
    got = runner.generate(prompts["input_ids"], prompts["attention_mask"], max_new_tokens=steps, stop_at_end=False)
    ties = []
    for row in range(len(got)):
        different = np.flatnonzero(got[row] != expected.tokens[row])
        if not len(different):
            continue
        step = int(different[0])
        margin = float(expected.margins[row, step])
        if margin > 2 * tolerance:
            raise ProofError(
                f"greedy tokens of ONNX Runtime ({provider}) leave PyTorch's at step {step} of prompt {row}, "
                f"where PyTorch's best token leads by {margin:.3g} (rounding explains {2 * tolerance:.3g})"
            )
        ties.append(step)
    return GreedyCheck(provider, len(got), steps, len(got) - len(ties), ties)
