"""The precisions of an exported graph, the exporters that make them, and which target runs which: one table for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from doran_core.errors import ConfigError
from doran_export.errors import UnsupportedModelError
from doran_export.runtime.providers import PROVIDERS
from doran_export.tasks import Task

__all__ = [
    "EXPORTERS",
    "PRECISIONS",
    "Exporter",
    "Precision",
    "exporter_for",
    "precision_for",
    "proof_providers",
    "target_for",
]

_CPU, _CUDA = PROVIDERS["cpu"], PROVIDERS["cuda"]


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        name: the name that users give.
        dtype: dtype of the weights before any quantization.
        on_cpu: dtype that a graph for the CPU computes in; one for CUDA computes in `dtype`.
        tolerance: largest allowed difference of an output from PyTorch's in float32, measured by `rule`.
        rule: "absolute" compares each element on the user's inputs. On random inputs, which make some tokens amplify
            rounding, the tolerance is multiplied by the root mean square of the output where that is over 1.
            "relative" multiplies the tolerance so on all inputs. "average" compares the root mean square of the
            difference with the standard deviation of the output along its last axis (an unrelated graph has 1.4). With
            few bits the model is near the original, but not equal: greedy tokens are then reported, and may differ.
    """

    name: str
    dtype: torch.dtype
    on_cpu: torch.dtype
    tolerance: float
    rule: Literal["absolute", "relative", "average"]

    def arithmetic(self, target: str) -> torch.dtype:
        """The dtype that a graph for this execution provider computes in."""
        return self.on_cpu if target == _CPU else self.dtype


@dataclass(frozen=True)
class Exporter:
    """One way from PyTorch to ONNX.

    Attributes:
        name: the exporter's name in `--exporter`.
        providers: for each precision, the execution providers that run this exporter's graphs.
        why_not: for a precision that only some providers run, the reason, for the message.
    """

    name: str
    providers: dict[str, tuple[str, ...]]
    why_not: dict[str, str] = field(default_factory=dict)


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", torch.float32, torch.float32, 1e-3, "absolute"),
    "fp16": Precision("fp16", torch.float16, torch.float32, 5e-2, "relative"),
    "bf16": Precision("bf16", torch.bfloat16, torch.bfloat16, 2e-1, "average"),
    "int8": Precision("int8", torch.float32, torch.float32, 3e-1, "average"),
    "int4": Precision("int4", torch.float32, torch.float32, 8e-1, "average"),
}
"""Every precision by name."""

_BOTH = (_CUDA, _CPU)
_NO_BF16 = "the CPU provider of onnxruntime has no bfloat16 operators"

EXPORTERS: dict[str, Exporter] = {
    "torch": Exporter(
        "torch",
        {"fp32": _BOTH, "fp16": _BOTH, "bf16": (_CUDA,), "int8": (_CPU,)},
        {"bf16": _NO_BF16, "int8": "onnxruntime's dynamic int8 operators are the CPU's"},
    ),
    "genai": Exporter(
        "genai",
        {"fp32": _BOTH, "fp16": (_CUDA,), "bf16": (_CUDA,), "int8": _BOTH, "int4": _BOTH},
        {"bf16": _NO_BF16, "fp16": "its float16 graph for the CPU fails when a cache grows"},
    ),
}
"""Every exporter by name: torch.onnx.export, and the model builder of onnxruntime-genai."""


def precision_for(name: str) -> Precision:
    """The precision of a name.

    Raises:
        ConfigError: the name is not known.
    """
    try:
        return PRECISIONS[name]
    except KeyError:
        raise ConfigError(f"precision {name!r} is not known: expected one of {', '.join(PRECISIONS)}") from None


def exporter_for(task: Task, precision: Precision, requested: str | None, *, multi_adapter: bool) -> Exporter:
    """The exporter of a kind of model: the requested one, else the builder for a decoder and torch for everything else.

    Several adapters over one graph need the adapted layers as inputs, which only the torch exporter makes.

    Raises:
        ConfigError: `requested` is not a known name.
        UnsupportedModelError: the exporter cannot make this kind of model, this precision or several adapters.
    """
    if requested is not None and requested not in EXPORTERS:
        raise ConfigError(f"exporter {requested!r} is not known: expected one of {', '.join(EXPORTERS)}")
    chosen = requested or ("genai" if task.has_cache and not multi_adapter else "torch")
    exporter = EXPORTERS[chosen]
    if exporter.name == "genai" and not task.has_cache:
        raise UnsupportedModelError(f"the genai exporter makes text-generation models, not {task.name}: use torch")
    if exporter.name == "genai" and multi_adapter:
        raise UnsupportedModelError("the genai exporter does not take adapters as inputs: use torch")
    if precision.name not in exporter.providers:
        able = [name for name, other in EXPORTERS.items() if precision.name in other.providers]
        raise UnsupportedModelError(
            f"the {exporter.name} exporter has no {precision.name}: expected one of {', '.join(exporter.providers)}, "
            f"or the {' or '.join(able)} exporter"
            + ("" if task.has_cache else ", which makes text-generation models only")
        )
    if multi_adapter and precision.name == "int8":
        raise UnsupportedModelError("int8 does not take adapters as inputs: expected fp32, fp16 or bf16")
    return exporter


def proof_providers(
    exporter: Exporter, precision: Precision, wanted: Sequence[str] | None, available: Sequence[str]
) -> list[str]:
    """The providers for a graph's proof: the requested ones, or all available ones that run it, best first.

    Raises:
        ConfigError: a provider that is not available here.
        UnsupportedModelError: a provider does not run this precision, or no available one does.
    """
    able = exporter.providers[precision.name]
    reason = exporter.why_not.get(precision.name, "")
    for name in wanted or ():
        if name not in available:
            raise ConfigError(f"execution provider {name!r} is not available: expected some of {', '.join(available)}")
        if name not in able:
            raise UnsupportedModelError(
                f"{name} does not run {precision.name} of the {exporter.name} exporter: {reason}"
            )
    chosen = [name for name in (wanted or available) if name in able]
    if not chosen:
        raise UnsupportedModelError(
            f"{precision.name} of the {exporter.name} exporter runs on {', '.join(able)}, which onnxruntime does not "
            f"offer here (it has {', '.join(available)}): {reason}"
        )
    return chosen


def target_for(exporter: Exporter, precision: Precision, requested: str | None, proven_on: Sequence[str]) -> str:
    """The provider that a graph is made for: the requested one, or the best of the proof.

    Raises:
        ConfigError: `requested` is not a known name.
        UnsupportedModelError: the requested one does not run this precision, or the genai exporter, whose graphs hold
            operators of one provider, could not prove its graph here.
    """
    if requested is None:
        return proven_on[0]
    if requested not in PROVIDERS:
        raise ConfigError(f"target {requested!r} is not known: expected one of {', '.join(PROVIDERS)}")
    target = PROVIDERS[requested]
    if target not in exporter.providers[precision.name]:
        reason = exporter.why_not.get(precision.name, "")
        raise UnsupportedModelError(
            f"{requested} does not run {precision.name} of the {exporter.name} exporter: {reason}"
        )
    if exporter.name == "genai" and target not in proven_on:
        raise UnsupportedModelError(
            f"a graph of the genai exporter for {requested} runs on {requested} only, where the proof cannot run here"
        )
    return target
