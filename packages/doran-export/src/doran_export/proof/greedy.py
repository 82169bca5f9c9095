"""The greedy part of a proof: compares the tokens that ONNX Runtime chooses with PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from doran_export.errors import ProofError
from doran_export.graph.precision import Precision
from doran_export.proof.reference import Greedy
from doran_export.runtime.runner import OnnxRunner

__all__ = ["GreedyCheck", "compare_greedy", "generate_tokens", "real_prompts"]

_FEWEST_TOKENS = 0.25  # least share of all tokens that must be compared: ties end a comparison


@dataclass(frozen=True)
class GreedyCheck:
    """Greedy generation on one provider.

    Attributes:
        provider: the execution provider; for the genai exporter also ``"onnxruntime-genai"``: its own generator,
            which stops at an end token.
        adapter: name of the active adapter; None for the graph alone.
        prompts: number of prompts.
        steps: number of tokens that PyTorch generated from each.
        compared: number of tokens of all prompts that were found equal.
        identical: number of prompts whose `steps` tokens are all the same.
        ended: for prompts whose tokens are the same but end early with an end token, their number of tokens.
        ties: for the others, the step at which PyTorch's own two best tokens were nearer than twice the tolerance (in
            fp16 times the root mean square of the logits, where that is over 1).
        departures: for the rest, the step of the first difference. There are none but for int8, int4 and bf16.
    """

    provider: str
    adapter: str | None
    prompts: int
    steps: int
    compared: int
    identical: int
    ended: list[int]
    ties: list[int]
    departures: list[int]


def real_prompts(greedy: Greedy) -> list[NDArray[np.int64]]:
    """The prompts without their padding, each [length]."""
    masks = greedy.prompts["attention_mask"].astype(bool)
    return [ids[mask] for ids, mask in zip(greedy.prompts["input_ids"], masks, strict=True)]


def generate_tokens(runner: OnnxRunner, expected: Greedy) -> list[NDArray[np.int64]]:
    """The graph's tokens for every prompt, as many as PyTorch's."""
    steps, prompts = expected.tokens.shape[1], expected.prompts
    if runner.takes_padding:
        mask = prompts["attention_mask"]
        return list(runner.generate(prompts["input_ids"], mask, max_new_tokens=steps, stop_at_end=False))
    rows = [row[None] for row in real_prompts(expected)]
    return [runner.generate(row, max_new_tokens=steps, stop_at_end=False)[0] for row in rows]


def compare_greedy(
    got: Sequence[NDArray[np.int64]],
    expected: Greedy,
    precision: Precision,
    tolerance: float,
    *,
    provider: str,
    adapter: str | None = None,
    end_tokens: Set[int] = frozenset(),
) -> GreedyCheck:
    """Compare token by token. After a first difference a row's contexts differ, so its comparison ends.

    A difference is allowed if PyTorch's two best logits are within rounding of each other (a tie), or if the precision
    does not promise equal tokens (a departure).

    Args:
        got: tokens of each prompt; fewer than PyTorch's where a generator stopped at one of `end_tokens`.
        expected: PyTorch's tokens.
        precision: the graph's precision.
        tolerance: as in `prove`.
        provider: for the report and the messages.
        adapter: likewise.
        end_tokens: tokens that may stop a generator.

    Raises:
        ProofError: tokens differ, a generator stopped without an end token, or ties left too few tokens to compare.
    """
    scale = {"absolute": 1.0, "relative": max(1.0, expected.scale), "average": 0.0}[precision.rule]
    rounding = 2 * tolerance * scale
    steps = expected.tokens.shape[1]
    who = f"ONNX Runtime ({provider}{f', adapter {adapter}' if adapter else ''})"
    compared = 0
    ended: list[int] = []
    ties: list[int] = []
    departures: list[int] = []
    for row, tokens in enumerate(got):
        different = np.flatnonzero(tokens != expected.tokens[row, : len(tokens)])
        compared += int(different[0]) if len(different) else len(tokens)
        if not len(different):
            if len(tokens) < steps:
                if not (len(tokens) and int(tokens[-1]) in end_tokens):
                    raise ProofError(f"{who} stopped after {len(tokens)} tokens of prompt {row}, without an end token")
                ended.append(len(tokens))
            continue
        step = int(different[0])
        margin = float(expected.margins[row, step])
        if margin <= rounding:
            ties.append(step)
        elif precision.rule != "average":
            raise ProofError(
                f"greedy tokens of {who} differ from PyTorch's at step {step} of prompt {row}, "
                f"where PyTorch's best token leads by {margin:.3g} (rounding explains {rounding:.3g})"
            )
        else:
            departures.append(step)
    if precision.rule != "average":
        _require_enough(compared, len(got) * steps - sum(steps - count for count in ended), rounding, who)
    identical = len(got) - len(ended) - len(ties) - len(departures)
    return GreedyCheck(
        provider, adapter, len(got), steps, compared, identical, sorted(ended), sorted(ties), sorted(departures)
    )


def _require_enough(compared: int, total: int, rounding: float, who: str) -> None:
    """Raises ProofError where ties left too few of all tokens to compare."""
    if compared < _FEWEST_TOKENS * total:
        raise ProofError(
            f"greedy tokens of {who} could be compared for only {compared} of {total}: PyTorch's two best "
            f"tokens lie within {rounding:.3g} of each other too often; give inputs with clearer choices"
        )
