"""The split of a layer's gradient: the part orthogonal to the weight's direction, and the parallel part that tau keeps.

With G = dL/dW' and v = V / ||V||, DoRAN's gradient per row is ``c (G_orthogonal + tau / (n + tau) G_parallel)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from doran_core import functional
from doran_core.errors import DoranError, TargetError
from doran_core.layers.adapter import DoranAdapter
from doran_core.layers.base import BaseView
from doran_core.layers.modules import AdaptedLayer

__all__ = ["GradientProbe", "GradientSplit", "ProbedLayer", "gradient_split"]


@dataclass(frozen=True)
class GradientSplit:
    """The gradient of one layer's weight W' in its two parts.

    Attributes:
        orthogonal: Frobenius norm of the part orthogonal to each row of V.
        parallel: Frobenius norm of the part along each row of V.
        parallel_weight: mean over rows of ``tau / (n + tau)``: how much of the parallel part reaches V; 0 for DoRA.
        kept_parallel: Frobenius norm of the parallel part after that weight, row by row.
    """

    orthogonal: float
    parallel: float
    parallel_weight: float
    kept_parallel: float


@torch.no_grad()
def gradient_split(gradient: Tensor, direction: Tensor, tau: Tensor | float) -> GradientSplit:
    """Split a weight's gradient.

    Args:
        gradient: ``G = dL/dW'``, ``[d_out, d_in]``.
        direction: ``V = W0 + g B A``, ``[d_out, d_in]``.
        tau: a number, ``[1]`` or ``[d_out]``.
    """
    gradient, direction = gradient.double(), direction.double()
    norm = direction.norm(dim=1)
    along = (gradient * direction).sum(1) / norm.clamp_min(1e-300)
    across = (gradient.square().sum(1) - along.square()).clamp_min(0)
    tau = tau.double() if isinstance(tau, Tensor) else torch.tensor(tau, dtype=torch.float64)
    weight = tau / (norm + tau).clamp_min(1e-300)
    return GradientSplit(
        orthogonal=float(across.sum().sqrt()),
        parallel=float(along.norm()),
        parallel_weight=float(weight.expand_as(norm).mean()),
        kept_parallel=float((weight * along).norm()),
    )


@dataclass(frozen=True)
class ProbedLayer:
    """A layer to watch: the module that maps x ``[..., d_in]`` to ``[..., d_out]``, its base, its adapter."""

    module: nn.Module
    view: BaseView
    adapter: DoranAdapter

    @property
    def can_be_split(self) -> bool:
        """Whether it is a linear layer whose weight can be read."""
        return self.view.kind in ("linear", "conv1d") and self.view.experts is None


class GradientProbe:
    """Records the gradient split of every adapted linear layer in the backward passes inside a ``with``.

    ::

        with GradientProbe(model) as probe:
            loss(model(x)).backward()
        probe.splits()["model.layers.0.self_attn.q_proj"].kept_parallel

    Args:
        model: a model adapted by :func:`doran_core.adapt`, or layers by name, for models that other packages adapt.
        first_pass_only: record the first pass through each layer only. By default the gradients ``[d_out, d_in]`` of
            all passes are kept and summed, which takes too much memory beside a training.

    Raises:
        TargetError: if there is no adapted linear layer.
    """

    def __init__(self, model: nn.Module | Mapping[str, ProbedLayer], *, first_pass_only: bool = False) -> None:
        layers = dict(_layers_of(model)) if isinstance(model, nn.Module) else model
        self._layers = {name: layer for name, layer in layers.items() if layer.can_be_split}
        if not self._layers:
            raise TargetError(f"this {type(model).__name__} has no linear layer adapted by doran_core")
        self._first_pass_only = first_pass_only
        self._gradients: dict[str, Tensor] = {}
        self._splits: dict[str, GradientSplit] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> GradientProbe:
        for name, layer in self._layers.items():
            self._hooks.append(layer.module.register_forward_hook(self._watch(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def saw_gradients(self) -> bool:
        """Whether a backward pass reached an adapted layer."""
        return bool(self._splits or self._gradients)

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad or name in self._splits:
                return
            x = args[0].detach().reshape(-1, args[0].shape[-1])

            @torch.no_grad()
            def after_backward(grad: Tensor) -> None:
                grad = grad.reshape(-1, grad.shape[-1])
                if not self._first_pass_only:
                    self._gradients[name] = self._gradients.get(name, 0) + grad.T.double() @ x.double()
                elif name not in self._splits:
                    wide = functional.accumulation_dtype(grad)
                    self._splits[name] = self._split(name, grad.T.to(wide) @ x.to(wide))

            output.register_hook(after_backward)  # type: ignore[no-untyped-call]

        return after_forward

    @torch.no_grad()
    def splits(self) -> dict[str, GradientSplit]:
        """The split of each layer's gradient, by module name. Gradients are summed since the ``with`` began.

        Raises:
            DoranError: if no backward pass was seen.
        """
        if not self.saw_gradients:
            raise DoranError("GradientProbe saw no backward pass: run forward and backward inside its `with`")
        return self._splits | {name: self._split(name, gradient) for name, gradient in self._gradients.items()}

    def _split(self, name: str, gradient: Tensor) -> GradientSplit:
        layer = self._layers[name]
        weight, adapter = layer.view.weight(), layer.adapter
        assert weight is not None
        with adapter.inference_mode_of_method():
            A, B = adapter.factor_pair()
        direction = functional.direction(weight.to(gradient.dtype), A, B, adapter.scaling)
        return gradient_split(gradient, direction, adapter.tau.value())


def _layers_of(model: nn.Module) -> Iterator[tuple[str, ProbedLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            adapter = module.doran_adapter
            yield adapter.spec.name or name, ProbedLayer(module, module.view, adapter)
