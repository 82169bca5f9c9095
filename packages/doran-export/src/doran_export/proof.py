"""The proof that an exported directory computes what PyTorch computes: ONNX Runtime against recorded outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doran_export.errors import ProofError
from doran_export.files import GENAI_CONFIG
from doran_export.genai import genai_tokens
from doran_export.precision import Precision
from doran_export.reference import Answer, Greedy, Reference
from doran_export.runner import OnnxRunner
from doran_export.spec import GraphSpec

__all__ = ["Check", "GreedyCheck", "Proof", "prove"]

_FEWEST_CERTAIN = 0.8  # share of rows that must remain for a comparison to say anything


@dataclass(frozen=True)
class Check:
    """One case on one provider.

    Attributes:
        adapter: name of the active adapter; None for the graph alone.
        max_difference: largest absolute difference by output name, padding left out.
        rms_difference: root mean square of the difference by output name.
        rms_spread: root mean square of what PyTorch's output varies by in its last axis, by output name.
        limit: what was allowed of max_difference by output name: the tolerance, but for random inputs, and in fp16,
            times the output's largest value where that is over 1; empty where the precision's rule is the average.
        same_argmax: share of rows (or real tokens) whose largest logit is the same one; None without logits.
        compared: number of rows or tokens that were compared.
        uncertain: number of those left out because PyTorch's own answer moves by more than half the tolerance there
            when its layers round another way.
    """

    name: str
    provider: str
    adapter: str | None
    batch: int
    length: int | None
    max_difference: dict[str, float]
    rms_difference: dict[str, float]
    rms_spread: dict[str, float]
    limit: dict[str, float]
    same_argmax: float | None
    compared: int
    uncertain: int


@dataclass(frozen=True)
class GreedyCheck:
    """Greedy generation on one provider.

    Attributes:
        provider: the execution provider; for the road genai also ``"onnxruntime-genai"``, that is its own generator,
            which stops at an end token.
        adapter: name of the active adapter; None for the graph alone.
        prompts: number of prompts.
        steps: number of tokens generated from each.
        identical: number of prompts whose tokens are all the same.
        ties: for the others, the step at which PyTorch's own two best tokens were nearer than the tolerance.
        departures: for the rest, the step of the first difference. There are none but for int8, int4 and bf16.
    """

    provider: str
    adapter: str | None
    prompts: int
    steps: int
    identical: int
    ties: list[int]
    departures: list[int]


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

    @property
    def average(self) -> float:
        """Root mean square of the difference over that of the outputs' spread, over all rows; the worst output's."""
        return max(_pooled(self.checks).values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"max_difference": self.max_difference, "average": self.average, **asdict(self)}


def prove(
    directory: Path,
    spec: GraphSpec,
    references: Mapping[str | None, Reference],
    precision: Precision,
    tolerance: float,
    *,
    providers: Sequence[str],
    advance: Callable[[], None] = lambda: None,
) -> Proof:
    """Run every case in ONNX Runtime, on every provider and for every adapter in one session, and compare.

    Args:
        directory: the exported directory.
        spec: its graph.
        references: what PyTorch answered, by adapter; None is the graph alone.
        precision: of the graph.
        tolerance: largest allowed difference of any output, in the units of the precision.
        providers: execution providers to run one by one.
        advance: called after each case and after each generation.

    Raises:
        ProofError: an output is not finite or differs by more than the tolerance, or greedy tokens differ.
    """
    checks: list[Check] = []
    greedy: list[GreedyCheck] = []
    for provider in providers:
        runner = OnnxRunner(directory, providers=[provider])
        for adapter, reference in references.items():
            runner.set_adapter(adapter)
            for answer in reference.answers:
                checks.append(_compare(runner, spec, answer, precision, tolerance, provider))
                _require_near(checks[-1])
                advance()
            if reference.greedy is not None:
                tokens = _generate(runner, reference.greedy)
                greedy.append(_compare_greedy(tokens, reference.greedy, precision, tolerance, provider, adapter))
                advance()
        reference = references[None]
        if (directory / GENAI_CONFIG).is_file() and reference.greedy is not None and provider == providers[0]:
            rows = [_real_tokens(reference.greedy, row).tolist() for row in range(len(reference.greedy.tokens))]
            tokens = genai_tokens(directory, rows, reference.greedy.tokens.shape[1])
            greedy.append(_compare_greedy(tokens, reference.greedy, precision, tolerance, "onnxruntime-genai", None))
    _require_certain(checks, tolerance)
    if precision.rule == "average":
        _require_near_on_average(checks, tolerance)
    return Proof(tolerance, checks, greedy)


def _compare(
    runner: OnnxRunner, spec: GraphSpec, answer: Answer, precision: Precision, tolerance: float, provider: str
) -> Check:
    case = answer.case
    got = {"logits": runner.run_in_chunks(case.inputs, case.chunks)} if case.chunks else runner.run(case.inputs)
    differences: dict[str, float] = {}
    errors: dict[str, float] = {}
    spreads: dict[str, float] = {}
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
        certain = rows if precision.rule == "average" else rows & (answer.noise[name] <= tolerance / 2)
        output, reference = output[certain], reference[certain]
        largest = max(1.0, float(np.abs(reference).max(initial=0.0)))
        if precision.rule != "average":
            exact = precision.rule == "absolute" and case.given
            limits[name] = tolerance * (1.0 if exact else largest)
        differences[name] = float(np.abs(output - reference).max(initial=0.0))
        errors[name] = _rms(output - reference)
        spreads[name] = _rms(reference - reference.mean(-1, keepdims=True)) if reference.size else 0.0
        compared, uncertain = int(certain.sum()), int((rows & ~certain).sum())
        if name == "logits" and compared:
            same = float((output.argmax(-1) == reference.argmax(-1)).mean())
    return Check(
        case.name,
        provider,
        runner.adapter,
        case.batch,
        case.length,
        differences,
        errors,
        spreads,
        limits,
        same,
        compared,
        uncertain,
    )


def _require_near(check: Check) -> None:
    for name, limit in check.limit.items():
        difference = check.max_difference[name]
        if difference > limit:
            raise ProofError(
                f"ONNX Runtime ({check.provider}) differs from PyTorch by {difference:.3g} in {name} "
                f"({check.name}), more than the allowed {limit:.3g}"
            )


def _rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(values).mean())) if values.size else 0.0


def _pooled(checks: Sequence[Check]) -> dict[str, float]:
    """For each output the root mean square of the difference over that of the spread, over all rows of all checks."""

    def total(values: str, name: str) -> float:
        return sum(check.compared * float(getattr(check, values)[name]) ** 2 for check in checks)

    names = checks[0].rms_difference if checks else {}
    return {
        name: float(np.sqrt(total("rms_difference", name) / max(total("rms_spread", name), 1e-30))) for name in names
    }


def _require_near_on_average(checks: Sequence[Check], tolerance: float) -> None:
    for name, average in _pooled(checks).items():
        if not average <= tolerance:
            raise ProofError(
                f"ONNX Runtime differs from PyTorch in {name} by {average:.3g} of its spread on average, more than the "
                f"allowed {tolerance:.3g}"
            )


def _require_certain(checks: Sequence[Check], tolerance: float) -> None:
    compared = sum(check.compared for check in checks)
    total = compared + sum(check.uncertain for check in checks)
    if compared < _FEWEST_CERTAIN * total:
        raise ProofError(
            f"PyTorch's own rounding stays below {tolerance / 2:.3g} on only {compared} of {total} rows: "
            f"a tolerance of {tolerance:.3g} cannot be proven for this model"
        )


def _real_tokens(greedy: Greedy, row: int) -> NDArray[np.int64]:
    """A prompt without its padding [length]."""
    kept: NDArray[np.int64] = greedy.prompts["input_ids"][row][greedy.prompts["attention_mask"][row].astype(bool)]
    return kept


def _generate(runner: OnnxRunner, expected: Greedy) -> list[NDArray[np.int64]]:
    """The graph's tokens for every prompt, as many as PyTorch gave."""
    steps, prompts = expected.tokens.shape[1], expected.prompts
    if runner.takes_padding:
        mask = prompts["attention_mask"]
        return list(runner.generate(prompts["input_ids"], mask, max_new_tokens=steps, stop_at_end=False))
    rows = [_real_tokens(expected, row)[None] for row in range(len(expected.tokens))]
    return [runner.generate(row, max_new_tokens=steps, stop_at_end=False)[0] for row in rows]


def _compare_greedy(
    got: Sequence[NDArray[np.int64]],
    expected: Greedy,
    precision: Precision,
    tolerance: float,
    provider: str,
    adapter: str | None,
) -> GreedyCheck:
    """Compare token by token; after a first difference a row's contexts differ, so that nothing more can be said.

    A difference is forgiven only where PyTorch's own two best logits lie within rounding of each other, or the
    precision promises no equal tokens.
    """
    ties: list[int] = []
    departures: list[int] = []
    for row, tokens in enumerate(got):
        different = np.flatnonzero(tokens != expected.tokens[row, : len(tokens)])
        if not len(different):
            continue
        step = int(different[0])
        margin = float(expected.margins[row, step])
        if margin <= 2 * tolerance:
            ties.append(step)
        elif precision.rule != "average":
            raise ProofError(
                f"greedy tokens of ONNX Runtime ({provider}) leave PyTorch's at step {step} of prompt {row}, "
                f"where PyTorch's best token leads by {margin:.3g} (rounding explains {2 * tolerance:.3g})"
            )
        else:
            departures.append(step)
    identical = len(got) - len(ties) - len(departures)
    return GreedyCheck(
        provider, adapter, len(got), expected.tokens.shape[1], identical, sorted(ties), sorted(departures)
    )
