"""The cases of a measurement: the workload, and one engine for each case. Imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from doran_serve.merged.mode import merged_options

__all__ = ["Case", "Workload", "standard_cases"]


@dataclass(frozen=True)
class Workload:
    """Random prompts, answered greedily to a fixed length.

    Attributes:
        requests: number of requests, sent together.
        prompt_tokens: tokens of each prompt.
        output_tokens: tokens of each answer.
        rounds: number of rounds; results are medians.
    """

    requests: int = 128
    prompt_tokens: int = 128
    output_tokens: int = 128
    rounds: int = 5


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        name: the case's name in the results.
        plugin: whether doran-serve is loaded; without it vLLM is stock.
        model: the base model.
        engine: arguments of vLLM's `LLM`.
        adapters: directories, dealt to the requests in turn; none for the base model.
    """

    name: str
    plugin: bool
    model: str
    engine: Mapping[str, Any]
    adapters: Sequence[str] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)


def standard_cases(
    model: str, engine: Mapping[str, Any], lora: Sequence[str], doran: Sequence[str], rank: int
) -> list[Case]:
    """Base and LoRA on stock vLLM, DoRAN mixed, DoRAN merged.

    Args:
        model: the base model.
        engine: arguments of `LLM` for all cases.
        lora: LoRA directories for stock vLLM.
        doran: DoRAN directories of the same shapes.
        rank: max_lora_rank.
    """
    slots = {"enable_lora": True, "max_loras": len(doran), "max_cpu_loras": len(doran), "max_lora_rank": rank}
    merged = {"additional_config": merged_options()}
    return [
        Case("base", False, model, dict(engine)),
        Case("lora", False, model, {**engine, **slots}, tuple(lora)),
        Case("doran mixed", True, model, {**engine, **slots}, tuple(doran)),
        Case("doran merged", True, model, {**engine, **merged}, tuple(doran[:1])),
    ]
