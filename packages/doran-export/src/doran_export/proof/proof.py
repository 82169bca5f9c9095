"""The proof that an exported directory computes what PyTorch computes: ONNX Runtime against recorded outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from doran_export.files import GENAI_CONFIG
from doran_export.graph.genai import genai_tokens
from doran_export.graph.precision import Precision
from doran_export.graph.spec import GraphSpec
from doran_export.proof.checks import Check, averages, compare, require_average, require_certain
from doran_export.proof.greedy import GreedyCheck, compare_greedy, generate_tokens, real_prompts
from doran_export.proof.reference import Greedy, Reference
from doran_export.runtime.runner import OnnxRunner

__all__ = ["Proof", "prove"]


@dataclass(frozen=True)
class Proof:
    """All checks of one directory. Every check passed."""

    tolerance: float
    checks: list[Check]
    greedy: list[GreedyCheck]

    @property
    def max_difference(self) -> float:
        """The largest difference."""
        return max(value for check in self.checks for value in check.max_difference.values())

    @property
    def average(self) -> float:
        """Root mean square of the difference over that of the outputs' spread, in the worst group of checks."""
        return max(averages(self.checks).values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
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
        references: PyTorch's answers, by adapter; None is the graph alone.
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
                checks.append(compare(runner, spec, answer, precision, tolerance, provider))
                advance()
            if reference.greedy is not None:
                tokens = generate_tokens(runner, reference.greedy)
                greedy.append(
                    compare_greedy(tokens, reference.greedy, precision, tolerance, provider=provider, adapter=adapter)
                )
                advance()
    alone = references[None].greedy
    if alone is not None and (directory / GENAI_CONFIG).is_file():
        greedy.append(_compare_generator(directory, alone, precision, tolerance))
    require_certain(checks, tolerance)
    if precision.rule == "average":
        require_average(checks, tolerance)
    return Proof(tolerance, checks, greedy)


def _compare_generator(directory: Path, expected: Greedy, precision: Precision, tolerance: float) -> GreedyCheck:
    """The tokens of onnxruntime-genai's own generator, which its users run."""
    prompts = [prompt.tolist() for prompt in real_prompts(expected)]
    tokens, end_tokens = genai_tokens(directory, prompts, expected.tokens.shape[1])
    return compare_greedy(tokens, expected, precision, tolerance, provider="onnxruntime-genai", end_tokens=end_tokens)
