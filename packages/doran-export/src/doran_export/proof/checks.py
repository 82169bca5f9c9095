"""Compares ONNX Runtime's outputs with PyTorch's, case by case, and checks all cases of a proof together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doran_export.errors import ProofError
from doran_export.graph.precision import Precision
from doran_export.graph.spec import GraphSpec
from doran_export.proof.reference import Answer
from doran_export.runtime.runner import OnnxRunner

__all__ = ["Check", "averages", "compare", "require_average", "require_certain"]

_FEWEST_CERTAIN = 0.8  # least share of rows that must be compared
_NOISES = 10  # an uncertain row's limit is raised by this multiple of PyTorch's own noise


@dataclass(frozen=True)
class Check:
    """One case on one provider.

    Attributes:
        adapter: name of the active adapter; None for the graph alone.
        given: whether the user gave the inputs; otherwise they are random.
        chunked: whether a decoder got the sequence in pieces, on top of its cache.
        max_difference: largest absolute difference by output name, padding and uncertain rows left out.
        rms_difference: root mean square of the difference by output name, over the same rows.
        rms_spread: standard deviation of PyTorch's output along its last axis, by output name.
        limit: largest max_difference that was allowed, by output name: the tolerance. For random inputs and for fp16,
            where the root mean square of the output is over 1, the tolerance times that. Empty under the rule
            "average".
        same_argmax: share of rows (or real tokens) whose largest logit is the same one; None without logits.
        compared: number of rows or tokens that were compared, by output name.
        uncertain: number of rows or tokens left out, by output name. There PyTorch's own output changes by more than
            half the tolerance when its layers round another way. Their limit is raised by ten times that change.
    """

    name: str
    provider: str
    adapter: str | None
    batch: int
    length: int | None
    given: bool
    chunked: bool
    max_difference: dict[str, float]
    rms_difference: dict[str, float]
    rms_spread: dict[str, float]
    limit: dict[str, float]
    same_argmax: float | None
    compared: dict[str, int]
    uncertain: dict[str, int]


def compare(
    runner: OnnxRunner, spec: GraphSpec, answer: Answer, precision: Precision, tolerance: float, provider: str
) -> Check:
    """Run one case in ONNX Runtime and compare it with PyTorch's answer.

    Args:
        runner: the exported directory on `provider`, with its adapter active.
        spec: its graph.
        answer: PyTorch's.
        precision: of the graph.
        tolerance: as in `prove`.
        provider: for the report.

    Raises:
        ProofError: an output has another shape, is not finite, or differs by more than the precision's rule allows
            for a single case.
    """
    case = answer.case
    got = {"logits": runner.run_in_chunks(case.inputs, case.chunks)} if case.chunks else runner.run(case.inputs)
    who = f"ONNX Runtime ({provider}{f', adapter {runner.adapter}' if runner.adapter else ''})"
    found: dict[str, _Output] = {}
    for name, expected in answer.outputs.items():
        output = got[name].astype(np.float32, copy=False)
        if output.shape != expected.shape:
            raise ProofError(f"{who} gives {name} the shape {output.shape} ({case.name}), expected {expected.shape}")
        rows = np.ones(expected.shape[:-1], dtype=bool)
        if spec.task.per_token and output.ndim == 3:
            rows = case.inputs["attention_mask"].astype(bool)
        output = output[rows]
        if not np.isfinite(output).all():
            raise ProofError(f"{who} gives {name} that is not finite ({case.name})")
        exact = precision.rule == "absolute" and case.given
        limit = None if precision.rule == "average" else tolerance * (1.0 if exact else max(1.0, _rms(expected[rows])))
        what = f"{who} differs from PyTorch in {name} ({case.name})"
        found[name] = _compare_output(output, expected[rows], answer.noise[name][rows], tolerance, limit, what)
    return Check(
        case.name,
        provider,
        runner.adapter,
        case.batch,
        case.length,
        case.given,
        len(case.chunks) > 1,
        {name: one.difference for name, one in found.items()},
        {name: one.error for name, one in found.items()},
        {name: one.spread for name, one in found.items()},
        {name: one.limit for name, one in found.items() if one.limit is not None},
        found["logits"].same_argmax if "logits" in found else None,
        {name: one.compared for name, one in found.items()},
        {name: one.uncertain for name, one in found.items()},
    )


class _Output(NamedTuple):
    """The comparison of one output, see `Check`."""

    difference: float
    error: float
    spread: float
    limit: float | None
    same_argmax: float | None
    compared: int
    uncertain: int


def _compare_output(
    output: NDArray[np.float32],
    expected: NDArray[np.float32],
    noise: NDArray[np.float32],
    tolerance: float,
    limit: float | None,
    what: str,
) -> _Output:
    """Compare rows ``[rows, values]`` of one output; without a limit every row counts as certain.

    Raises:
        ProofError: a row differs by more than the limit, and by more than its noise explains; begins with `what`.
    """
    distance = np.abs(output - expected).max(-1)
    certain: NDArray[np.bool_] = np.ones(len(noise), dtype=bool)
    if limit is not None:
        certain = noise <= tolerance / 2
        _require_near(distance, limit + np.where(certain, 0.0, _NOISES * noise), what)
    kept, wanted = output[certain], expected[certain]
    return _Output(
        float(distance[certain].max(initial=0.0)),
        _rms(kept - wanted),
        _rms(wanted - wanted.mean(-1, keepdims=True)) if wanted.size else 0.0,
        limit,
        float((kept.argmax(-1) == wanted.argmax(-1)).mean()) if len(wanted) else None,
        int(certain.sum()),
        int((~certain).sum()),
    )


def _require_near(distance: NDArray[np.float32], allowed: NDArray[np.float32], what: str) -> None:
    beyond = np.flatnonzero(distance > allowed)
    if len(beyond):
        worst = beyond[(distance - allowed)[beyond].argmax()]
        raise ProofError(f"{what} by {distance[worst]:.3g}, more than the allowed {allowed[worst]:.3g}")


def _rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean())) if values.size else 0.0


def averages(checks: Sequence[Check]) -> dict[str, float]:
    """Root mean square of the difference over that of the spread, for each output of each group of checks.

    A group is a provider, an adapter, with or without a cache, given or random: rows of one do not dilute another's.
    """
    groups: dict[str, list[tuple[Check, str]]] = {}
    for check in checks:
        kind = f"{'given' if check.given else 'random'} inputs{', on a cache' if check.chunked else ''}"
        for name in check.rms_difference:
            adapter = f", adapter {check.adapter}" if check.adapter else ""
            groups.setdefault(f"{name} ({check.provider}{adapter}, {kind})", []).append((check, name))

    def total(members: list[tuple[Check, str]], values: str) -> float:
        return sum(check.compared[name] * float(getattr(check, values)[name]) ** 2 for check, name in members)

    return {
        group: float(np.sqrt(total(members, "rms_difference") / max(total(members, "rms_spread"), 1e-30)))
        for group, members in groups.items()
    }


def require_average(checks: Sequence[Check], tolerance: float) -> None:
    """Check every group of `averages` against the tolerance.

    Raises:
        ProofError: one is above it.
    """
    for group, average in averages(checks).items():
        if not average <= tolerance:
            raise ProofError(
                f"ONNX Runtime differs from PyTorch in {group} by {average:.3g} of its spread on average, more than "
                f"the allowed {tolerance:.3g}: so few bits change this model too much; take another precision, or "
                "allow more with --tolerance (tolerance=) and judge the result on inputs of your own"
            )


def require_certain(checks: Sequence[Check], tolerance: float) -> None:
    """Check that enough rows of every output, with every adapter, are certain.

    Raises:
        ProofError: too many are uncertain.
    """
    counts: dict[tuple[str | None, str], tuple[int, int]] = {}
    for check in checks:
        for name, number in check.compared.items():
            before = counts.get((check.adapter, name), (0, 0))
            counts[check.adapter, name] = before[0] + number, before[1] + number + check.uncertain[name]
    for (adapter, name), (compared, total) in counts.items():
        if compared < _FEWEST_CERTAIN * total:
            who = f" with adapter {adapter}" if adapter else ""
            raise ProofError(
                f"PyTorch's own rounding stays below {tolerance / 2:.3g} on only {compared} of {total} rows of {name}"
                f"{who}: a tolerance of {tolerance:.3g} cannot be proven for this model"
            )
