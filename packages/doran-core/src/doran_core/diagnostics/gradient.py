"""The split of a layer's gradient: the part orthogonal to the weight's direction, and the parallel part that tau keeps.

With G = dL/dW' and v = V / ||V||, DoRAN's gradient per row is ``c (G_orthogonal + tau / (n + tau) G_parallel)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from doran_core import functional
from doran_core.errors import DoranError, TargetError
from doran_core.layers.modules import DoranLayer

__all__ = ["GradientProbe", "GradientSplit", "gradient_split"]


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


class GradientProbe:
    """Records the gradient split of every adapted linear layer in the backward passes inside a ``with``.

    ::

        with GradientProbe(model) as probe:
            loss(model(x)).backward()
        probe.splits()["model.layers.0.self_attn.q_proj"].kept_parallel

    Args:
        model: an adapted model.

    Raises:
        TargetError: if the model has no adapted linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            module.doran_adapter.spec.name or name: module
            for name, module in model.named_modules()
            if isinstance(module, DoranLayer) and module.view.kind in ("linear", "conv1d")
        }
        if not self._layers:
            raise TargetError(f"this {type(model).__name__} has no linear layer adapted by doran_core.adapt")
        self._gradients: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> GradientProbe:
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_hook(self._watch(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])

            def after_backward(grad: Tensor) -> None:
                product = grad.reshape(-1, grad.shape[-1]).T.double() @ x.double()
                self._gradients[name] = self._gradients.get(name, 0) + product

            if output.requires_grad:
                output.register_hook(after_backward)  # type: ignore[no-untyped-call]

        return after_forward

    @torch.no_grad()
    def splits(self) -> dict[str, GradientSplit]:
        """The split of each layer, by module name, of the gradients added up since the ``with`` began.

        Raises:
            DoranError: if no backward pass was seen.
        """
        if not self._gradients:
            raise DoranError("GradientProbe saw no backward pass: run forward and backward inside its `with`")
        return {
            name: gradient_split(gradient, self._direction(name), self._layers[name].doran_adapter.tau.value())
            for name, gradient in self._gradients.items()
        }

    def _direction(self, name: str) -> Tensor:
        layer = self._layers[name]
        weight = layer.view.weight()
        if weight is None:
            raise TargetError(f"{name}: the gradient split needs the base weight, which its layer does not give")
        with layer.doran_adapter.inference_mode_of_method():
            A, B = layer.doran_adapter.factor_pair()
        return functional.direction(weight.double(), A, B, layer.doran_adapter.scaling)
