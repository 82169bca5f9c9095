"""An adapter directory as a report of plain data: one record per layer, with or without the base weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from doran_core.adapter import AnyAdapter, FoldedAdapter, TrainableAdapter, read_adapter
from doran_core.adapter.evaluate import LayerFactors, evaluate
from doran_core.adapter.validate import own_generator_parts
from doran_core.checkpoint.binding import BoundModule, bind
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.diagnostics.factors import effective_rank, singular_values
from doran_core.diagnostics.similarity import LayerSimilarity, layer_similarities
from doran_core.errors import AdapterFormatError, ConfigError
from doran_core.files import StrPath
from doran_core.files.opening import named_errors
from doran_core.functional import output_scale, row_norm
from doran_core.method.factors import FactorBuilder

__all__ = ["AdapterReport", "LayerReport", "Spread", "inspect_adapter"]


@dataclass(frozen=True)
class Spread:
    """Mean, least and largest of some values."""

    mean: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """The spread of a tensor of any shape."""
        return cls(float(values.double().mean()), float(values.min()), float(values.max()))


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer.

    Attributes:
        name: the module.
        rank, d_out, d_in: sizes.
        singular_values: of ``g B A``.
        effective_rank: see :func:`~doran_core.diagnostics.effective_rank`.
        tau: None in forms other than the trainable one.
        scale: c; None if computing c needs the base and no base is given.
        norm: ``n = ||W0 + g B A||`` per row; needs the base.
        tau_share: mean of ``tau / (n + tau)``, the part of the parallel gradient that the norm lets pass.
        change: ``||W' - W0|| / ||W0||``; needs the base.
    """

    name: str
    rank: int
    d_out: int
    d_in: int
    singular_values: list[float]
    effective_rank: float
    tau: Spread | None = None
    scale: Spread | None = None
    norm: Spread | None = None
    tau_share: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class AdapterReport:
    """A whole adapter.

    Attributes:
        directory: the adapter's path.
        form: "trainable", "folded", "peft-dora" or "peft-lora".
        created_by, base_model, base_fingerprint, task_type: as the adapter records them.
        parameters: numbers stored for the adapted layers.
        extra: names of the tensors that replace base parameters in full.
        layers: in natural order of their names.
        similarities: between the layers of each projection, in the same order.
    """

    directory: str
    form: str
    created_by: str | None
    base_model: str | None
    base_fingerprint: str | None
    task_type: str | None
    parameters: int
    extra: list[str]
    layers: list[LayerReport]
    similarities: list[LayerSimilarity]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return dataclasses.asdict(self)


@torch.no_grad()
def inspect_adapter(
    directory: StrPath,
    base_dir: StrPath | None = None,
    *,
    allow_base_mismatch: bool = False,
    factor_builder: FactorBuilder | None = None,
) -> AdapterReport:
    """Read an adapter of any form and measure its layers.

    Args:
        directory: the adapter.
        base_dir: its base checkpoint, for the measurements that need base weights.
        allow_base_mismatch: accept base weights with another fingerprint.
        factor_builder: the one given to :func:`doran_core.adapt`, for an adapter that was trained with one.

    Raises:
        AdapterFormatError: the adapter is not valid.
        BaseMismatchError, CheckpointError: the base is another one or cannot be read.
        ConfigError: no base is given, and the adapter's sizes are known from the base only (shared output layers, or a
            custom generator).
    """
    adapter = read_adapter(directory)
    if base_dir is not None:
        checkpoint = Checkpoint(base_dir)
        bound = bind(
            adapter,
            checkpoint,
            directory,
            allow_base_mismatch=allow_base_mismatch,
            factor_builder=factor_builder,
        )
        modules = sorted(bound.modules, key=lambda module: _natural(module.name))
        factors = [module.factors for module in modules]
        layers = [_bound_report(module) for module in modules]
        checkpoint.require_unchanged()
    else:
        _check_sizes_known(adapter, directory)
        with named_errors(directory, AdapterFormatError):
            factors = sorted(evaluate(adapter, factor_builder=factor_builder), key=lambda layer: _natural(layer.name))
            layers = [_report(layer) for layer in factors]
    peft = not isinstance(adapter, TrainableAdapter | FoldedAdapter)
    return AdapterReport(
        directory=str(directory),
        form=_form(adapter),
        created_by="PEFT" if peft else adapter.created_by,  # type: ignore[union-attr]
        base_model=adapter.base_model,
        base_fingerprint=None if peft else adapter.base_fingerprint,  # type: ignore[union-attr]
        task_type=adapter.task_type,
        parameters=_parameters(adapter),
        extra=sorted(adapter.extra),
        layers=layers,
        similarities=layer_similarities(factors),
    )


def _check_sizes_known(adapter: AnyAdapter, directory: StrPath) -> None:
    if not isinstance(adapter, TrainableAdapter):
        return
    own = own_generator_parts(adapter.config, adapter.modules)
    if own or adapter.config.share_output:
        reason = "generator is not DoRAN's" if own else "output layers are shared"
        raise ConfigError(f"{directory}: its {reason}, so sizes are known from the base only: give the base (--base)")


def _form(adapter: AnyAdapter) -> str:
    if isinstance(adapter, TrainableAdapter):
        return "trainable"
    if isinstance(adapter, FoldedAdapter):
        return "folded"
    return "peft-dora" if any(module.magnitude is not None for module in adapter.modules.values()) else "peft-lora"


def _parameters(adapter: AnyAdapter) -> int:
    if isinstance(adapter, TrainableAdapter):
        return sum(tensor.numel() for parts in adapter.modules.values() for tensor in parts.values())
    return sum(
        m.A.numel() + m.B.numel() + (0 if m.magnitude is None else m.magnitude.numel())
        for m in adapter.modules.values()
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _report(layer: LayerFactors) -> LayerReport:
    values = singular_values(layer.A, layer.B, layer.scaling)
    known_tau = isinstance(layer.tau, Tensor) and layer.magnitude is not None
    return LayerReport(
        name=layer.name,
        rank=layer.A.shape[0],
        d_out=layer.sizes[0],
        d_in=layer.sizes[1],
        singular_values=values.tolist(),
        effective_rank=effective_rank(values),
        tau=Spread.of(layer.tau) if known_tau and isinstance(layer.tau, Tensor) else None,
        scale=None if layer.scale is None else Spread.of(layer.scale),
    )


def _bound_report(module: BoundModule) -> LayerReport:
    layer = module.factors
    norms, changed, total = [], 0.0, 0.0
    for rows, stored in module.weight_rows():
        weight = stored.double()
        norms.append(row_norm(weight, layer.A.double(), layer.B[rows].double(), layer.scaling))
        changed += float((module.merged_rows(weight, rows) - weight).square().sum())
        total += float(weight.square().sum())
    norm = torch.cat(norms)
    tau = layer.tau.double() if isinstance(layer.tau, Tensor) else torch.tensor(layer.tau, dtype=torch.float64)
    scale = layer.scale
    if scale is None:
        assert layer.magnitude is not None
        scale = output_scale(layer.magnitude.double(), norm, tau)
    return dataclasses.replace(
        _report(layer),
        scale=Spread.of(scale),
        norm=Spread.of(norm),
        tau_share=float((tau / (norm + tau).clamp_min(1e-300)).mean()) if layer.scale is None else None,
        change=(changed / total) ** 0.5 if total else None,
    )
