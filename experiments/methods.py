"""The methods that are compared, as options of doran_core, and the ranks that give each the same trainable budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from doran_core import DoranConfig, adapt
from experiments.errors import ExperimentError

__all__ = ["METHODS", "OWN_OPTIONS", "Method", "adapter_parameters", "is_generated", "matched_rank", "method_config"]

OWN_OPTIONS = frozenset({"b_rate"})
"""Options of an arm that are the runner's: ``b_rate`` is the rate of B's last layer over that of all else (LoRA+)."""


@dataclass(frozen=True)
class Method:
    """What trains besides the classifier.

    Attributes:
        adapter: options of :class:`doran_core.DoranConfig`; None trains no adapter.
        scaled: whether the output scale c is there; without it and with static factors, the method is LoRA.
        whole: every weight of the model trains.
    """

    adapter: Mapping[str, Any] | None = field(default_factory=dict)
    scaled: bool = True
    whole: bool = False


_DORA = {"factors": "static", "tau_kind": "zero", "norm_grad": "detached"}

METHODS: dict[str, Method] = {
    "head": Method(adapter=None),
    "full": Method(adapter=None, whole=True),
    "lora": Method({"factors": "static", "tau_kind": "zero"}, scaled=False),
    "dora": Method(_DORA),
    "tau_only": Method({"factors": "static"}),
    "generators_only": Method({"tau_kind": "zero"}),
    "doran": Method(),
    "doran_mlae": Method({"experts": True, "expert_mask": "expert", "expert_dropout": 0.1}),
}


def is_generated(name: str, options: Mapping[str, Any]) -> bool:
    """Whether networks make the factors."""
    adapter = METHODS[name].adapter
    return adapter is not None and {**adapter, **options}.get("factors", "generated") == "generated"


def method_config(name: str, options: Mapping[str, Any], targets: list[str], rank: int) -> DoranConfig:
    """The configuration of a method with an adapter; alpha is twice the rank, so the scaling is 2 at every rank.

    The norm is the direct one: it keeps its digits where a high learning rate makes W0 and the update cancel. A width
    may be told in ranks, as in ``hidden_dim: 2 ranks``.
    """
    method = METHODS[name]
    if method.adapter is None:
        raise ExperimentError(f"method {name!r} has no adapter")
    values = {key: value for key, value in {**method.adapter, **options}.items() if key not in OWN_OPTIONS}
    for key in ("embedding_dim", "hidden_dim"):
        if isinstance(told := values.get(key), str):
            values[key] = int(told.removesuffix(" ranks")) * rank
    return DoranConfig(rank=rank, alpha=2.0 * rank, target_modules=targets, norm_method="direct", **values)


def adapter_parameters(model: nn.Module, name: str, options: Mapping[str, Any], targets: list[str], rank: int) -> int:
    """Trainable numbers of the adapters of a method on this model; LoRA's without the magnitude."""
    handle = adapt(model, method_config(name, options, targets, rank))
    try:
        count = sum(parameter.numel() for parameter in handle.parameters())
        if not METHODS[name].scaled:
            count -= sum(layer.doran_adapter.magnitude.numel() for layer in handle.layers.values())
        return count
    finally:
        handle.remove()


def matched_rank(
    model: nn.Module, name: str, options: Mapping[str, Any], targets: list[str], *, reference_rank: int
) -> tuple[int, int]:
    """The rank whose number of trainable parameters is nearest to that of LoRA at ``reference_rank``.

    Returns:
        The rank and the number.
    """
    random_state = torch.get_rng_state()
    try:
        same_layers = {key: value for key, value in options.items() if key == "exclude_modules"}
        budget = adapter_parameters(model, "lora", same_layers, targets, reference_rank)
        best: tuple[int, int] | None = None
        for rank in range(1, 4 * reference_rank + 1):
            count = adapter_parameters(model, name, options, targets, rank)
            if best is not None and abs(count - budget) >= abs(best[1] - budget):
                break
            best = rank, count
        assert best is not None
        return best
    finally:
        torch.set_rng_state(random_state)
