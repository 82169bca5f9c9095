"""The state of a model's adapters, layer by layer: tau, norms, ranks; and the penalty on generated factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from doran_core.diagnostics import GradientSplit, ProbedLayer, effective_rank, singular_values
from doran_core.layers import DoranAdapter
from doran_hf.layer import DoranLayer, check_adapter, doran_layers

__all__ = ["LayerState", "factor_penalty", "layer_states", "probed_layers", "tau_by_layer"]


@dataclass(frozen=True)
class LayerState:
    """One adapted layer at one step; the gradient's parts are None if no gradient was recorded.

    Attributes:
        step: number of optimizer steps done.
        layer: the module's name in the base model.
        tau: mean over its values, as inference uses it.
        norm: mean of ``||W0 + g B A||`` over the rows.
        scale: mean of ``c = m / (n + tau)`` over the rows.
        effective_rank: of B A, from 1 to r; 0 at the start, where B = 0.
        gradient_orthogonal: Frobenius norm of the part of dL/dW' orthogonal to each row of V.
        gradient_parallel: Frobenius norm of the part of dL/dW' along each row of V.
        gradient_parallel_kept: the parallel part after the factor tau / (n + tau); 0 for DoRA.
    """

    step: int
    layer: str
    tau: float
    norm: float
    scale: float
    effective_rank: float
    gradient_orthogonal: float | None = None
    gradient_parallel: float | None = None
    gradient_parallel_kept: float | None = None


def _adapters(model: nn.Module, adapter_name: str | None) -> list[tuple[DoranLayer, DoranAdapter]]:
    """Adapted layers and their adapters: of one name, or the active ones.

    Raises:
        ConfigError: see :func:`doran_hf.layer.check_adapter`.
    """
    check_adapter(model, adapter_name)
    found = []
    for layer in doran_layers(model, adapter_name):
        names = [adapter_name] if adapter_name is not None else layer.active_adapters
        found += [(layer, layer.adapter(name)) for name in names if name in layer.doran_adapter]
    return found


def tau_by_layer(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """tau of every adapted layer, at inference.

    Args:
        model: with DoRAN adapters, wrapped by PEFT or not.
        adapter_name: which adapter; None for the active one.

    Returns:
        For each module name of the base model ``[1]`` or, per head or row, ``[d_out]``: detached copies on the CPU.

    Raises:
        ConfigError: a model without DoRAN adapters, or no adapter of this name.
    """
    return {layer.name: adapter.tau.value().detach().cpu().clone() for layer, adapter in _adapters(model, adapter_name)}


def factor_penalty(model: nn.Module, adapter_name: str | None = None) -> Tensor | None:
    """The penalty on the factors, multiplied by ``DoranConfig.factor_penalty``: a scalar to add to the loss.

    In training, models whose output has a loss add the penalty automatically. Use this function if you compute the
    loss yourself.

    Args:
        model: with DoRAN adapters, wrapped by PEFT or not.
        adapter_name: which adapter; None for the active ones.

    Returns:
        The mean over the adapted layers, or None if no configuration asks for a penalty.

    Raises:
        ConfigError: a model without DoRAN adapters, or no adapter of this name.
    """
    penalties = [a.penalty() for _, a in _adapters(model, adapter_name) if a.config.factor_penalty > 0.0]
    if not penalties:
        return None
    total = penalties[0]
    for penalty in penalties[1:]:
        total = total + penalty.to(total.device)
    return total / len(penalties)


def probed_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, ProbedLayer]:
    """The adapted layers as :class:`doran_core.diagnostics.GradientProbe` takes them, by module name.

    Args:
        model: with DoRAN adapters, wrapped by PEFT or not.
        adapter_name: which adapter; None for the active one.
    """
    return {layer.name: ProbedLayer(layer, layer.view, adapter) for layer, adapter in _adapters(model, adapter_name)}


@torch.no_grad()
def layer_states(
    model: nn.Module, step: int, splits: dict[str, GradientSplit] | None = None, adapter_name: str | None = None
) -> list[LayerState]:
    """The state of every adapted layer, in the model's order.

    Args:
        model: with DoRAN adapters, wrapped by PEFT or not.
        step: the step number for the records.
        splits: from a :class:`doran_core.diagnostics.GradientProbe`, by module name.
        adapter_name: which adapter; None for the active one.
    """
    states = []
    for layer, adapter in _adapters(model, adapter_name):
        with adapter.inference_mode_of_method():
            A, B = adapter.factor_pair()
            norm, tau = adapter.norm(layer.view, A, B), adapter.tau.value()
            scale = adapter.output_scale(norm)
            values = singular_values(A, B, adapter.scaling)
            ranks = [effective_rank(own) for own in values.reshape(-1, values.shape[-1])]  # one per expert
        split = (splits or {}).get(layer.name)
        states.append(
            LayerState(
                step=step,
                layer=layer.name,
                tau=float(tau.mean()),
                norm=float(norm.mean()),
                scale=float(scale.mean()),
                effective_rank=sum(ranks) / len(ranks),
                gradient_orthogonal=None if split is None else split.orthogonal,
                gradient_parallel=None if split is None else split.parallel,
                gradient_parallel_kept=None if split is None else split.kept_parallel,
            )
        )
    return states
