"""Many runs in one model: the frozen base serves all of them in one batch, and only the adapters are per run.

The batch holds K runs one after the other, ``[K * N, ...]``. An adapted layer multiplies all of it by W0 at once and
adds each run's own update. A, B and c of each run come from doran_core's adapters, mapped over the stacked parameters;
the runs do not see each other, so a run in a stack is the run that it would be alone, but for rounding (a test holds
that). Masks and noise are the exception: they are drawn for the stack, so other company gives other draws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from doran_core import DoranConfig, adapt, functional
from doran_core.kernels.backend import use_backend
from doran_core.layers import BaseView, DoranAdapter, base_view

__all__ = ["StackedAdapters"]

Factors = tuple[Tensor, Tensor, Tensor]
"""c ``[d_out]``, A ``[r, d_in]`` and B' ``[d_out, r]``; of a stack, with K in front."""


class _StackedLinear(nn.Module):
    """A frozen linear layer with K adapters: ``x [K * N, ..., d_in]`` to ``[K * N, ..., d_out]``."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bias: Tensor | None = base_view(base_layer).bias
        self.factors: Factors | None = None
        self.watched_tau: Tensor | None = None
        """tau of each run, ``[K, 1]`` or ``[K, d_out]``: the next backward pass leaves its gradient's split."""
        self.split: Tensor | None = None
        """Shares of the squared gradient of W' that run along the rows, and that tau keeps of them, ``[2, K]``."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x)
        assert self.factors is not None
        scale, A, scaled_B = self.factors
        runs = scale.shape[0]
        delta = x.reshape(runs, -1, x.shape[-1]) @ A.mT @ scaled_B.mT
        adapted = vmap(functional.adapted_output, in_dims=(0, 0, 0, None))(
            output.reshape(runs, -1, output.shape[-1]), delta, scale, self.bias
        )
        if self.watched_tau is not None:
            inputs = x.detach().reshape(runs, -1, x.shape[-1])
            adapted.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._split_gradient(gradient, inputs)
            )
        return adapted.reshape(output.shape)

    @torch.no_grad()
    def _split_gradient(self, gradient: Tensor, inputs: Tensor) -> None:
        """From the gradient of the output ``[K, n, d_out]``; the parts are those of doran_core's GradientSplit."""
        assert self.factors is not None
        assert self.watched_tau is not None
        scale, A, scaled_B = self.factors
        weight = base_view(self.base_layer).weight()
        assert weight is not None
        of_weight = gradient.float().mT @ inputs.float()
        direction = weight + (scaled_B / scale[..., None]) @ A
        norm = direction.norm(dim=-1)
        along = (of_weight * direction).sum(-1) / norm
        kept = self.watched_tau / (norm + self.watched_tau) * along
        total = of_weight.square().sum((-2, -1))
        self.split = torch.stack([along.square().sum(-1), kept.square().sum(-1)]) / total


class _Adapters(nn.Module):
    """The adapters of one run; called, it gives the factors of every layer."""

    def __init__(self, adapters: Mapping[str, DoranAdapter], *, scaled: bool) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters.values())
        self.scaled = scaled
        if not scaled:
            for adapter in adapters.values():
                adapter.magnitude.requires_grad_(False)

    def forward(self, views: Sequence[BaseView]) -> list[Factors]:
        return [self._factors(a, view) for a, view in zip(self.adapters, views, strict=True)]  # type: ignore[arg-type]

    def _factors(self, adapter: DoranAdapter, view: BaseView) -> Factors:
        if self.scaled:
            return adapter.scale_and_factors(view)
        A, B = adapter.factor_pair()
        scale = torch.ones_like(adapter.magnitude)
        return scale, A, functional.scaled_factor(B, scale, adapter.scaling)


class StackedAdapters:
    """K runs of one configuration, each with its own start, in a copy of a model.

    Attributes:
        model: the copy, with its target layers adapted. Takes batches of K runs one after the other.
        flat: all trainable numbers, ``[K, P]``, a leaf.
        layers: names of the adapted layers.
        size: P.

    Args:
        base: the frozen model, on the CPU: starts are drawn there, so that they do not depend on the device.
        config: the method.
        seeds: of the K runs.
        device: where to compute.
        scaled: False leaves out the output scale (LoRA).
    """

    def __init__(
        self, base: nn.Module, config: DoranConfig, seeds: Sequence[int], device: torch.device, *, scaled: bool = True
    ) -> None:
        starts: list[Tensor] = []
        for seed in seeds:
            torch.manual_seed(seed)
            handle = adapt(base, config)
            adapters = {name: layer.doran_adapter for name, layer in handle.layers.items()}
            template = _Adapters(adapters, scaled=scaled)
            trained = {name: p for name, p in template.named_parameters() if p.requires_grad}
            starts.append(torch.cat([p.detach().flatten() for p in trained.values()]))
            handle.remove()
        self.layers = list(adapters)
        self.scaled = scaled
        self._shapes = {name: p.shape for name, p in trained.items()}
        self._template = template.to(device)
        self.model = copy.deepcopy(base).to(device).requires_grad_(False).eval()
        self._stacked = self._wrap()
        self._views = [base_view(layer.base_layer) for layer in self._stacked]
        for adapter, view in zip(self._each_adapter(), self._views, strict=True):
            adapter.reset_base(view)
        self.flat = torch.stack(starts).to(device).requires_grad_()
        self.size = self.flat.shape[1]

    def multiples(self, b_rate: float) -> Tensor:
        """What each trained number's rate is a multiple of, ``[P]``: 1, and ``b_rate`` for B or its last layer."""
        last = ("factors.B", "factors.w2_B")
        parts = [
            torch.full((shape.numel(),), b_rate if name.endswith(last) or ".output_B." in name else 1.0)
            for name, shape in self._shapes.items()
        ]
        return torch.cat(parts).to(self.flat.device)

    def _wrap(self) -> list[_StackedLinear]:
        stacked = []
        for name in self.layers:
            stacked.append(_StackedLinear(self.model.get_submodule(name)))
            self.model.set_submodule(name, stacked[-1])
        return stacked

    def _each_adapter(self) -> list[DoranAdapter]:
        return list(self._template.adapters)  # type: ignore[arg-type]

    def _parameters(self) -> dict[str, Tensor]:
        """The parameters by name, views of ``flat`` with K in front."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = torch.split(self.flat, sizes, dim=1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _map(self, function: Callable[[], Any]) -> Any:
        """``function`` for each run, with the run's parameters in the adapters; results have K in front."""

        def one(parameters: dict[str, Tensor]) -> Any:
            return functional_call(_Calling(self._template, function), _prefixed(parameters), ())

        with use_backend("reference"):  # the kernels know nothing of vmap
            return vmap(one, randomness="different")(self._parameters())

    def prepare(self, *, training: bool) -> None:
        """Compute the factors of this pass; masks and noise are drawn in training."""
        self._template.train(training)
        factors = self._map(lambda: self._template(self._views))
        for layer, of_layer in zip(self._stacked, factors, strict=True):
            layer.factors = of_layer

    @torch.no_grad()
    def tau_and_norm(self) -> tuple[Tensor, Tensor]:
        """Mean tau and mean row norm ``||W0 + g B A||`` of each layer, ``[K, layers]`` each; 0 and 0 for LoRA."""
        if not self.scaled:
            zeros = torch.zeros(self.flat.shape[0], len(self.layers))
            return zeros, zeros

        def both() -> tuple[Tensor, Tensor]:
            self._template.eval()
            taus, norms = [], []
            for adapter, view in zip(self._each_adapter(), self._views, strict=True):
                taus.append(adapter.tau.value().mean())
                norms.append(adapter.norm(view, *adapter.factor_pair()).mean())
            return torch.stack(taus), torch.stack(norms)

        tau, norm = self._map(both)
        runs = self.flat.shape[0]
        return tau.expand(runs, -1).cpu(), norm.expand(runs, -1).cpu()

    @torch.no_grad()
    def watch_gradients(self) -> None:
        """Have the next backward pass leave what :meth:`gradient_shares` returns; no part of it for LoRA."""
        if not self.scaled:
            return
        taus = self._map(lambda: [adapter.tau.value().reshape(-1) for adapter in self._each_adapter()])
        for layer, tau in zip(self._stacked, taus, strict=True):
            layer.watched_tau = tau.to(self.flat.device)  # a fixed tau is a number, made on the CPU

    def gradient_shares(self) -> Tensor | None:
        """Shares of each layer's squared gradient along the rows of its weight, and of what tau keeps of these.

        Returns:
            ``[2, K, layers]``; None for LoRA.
        """
        if not self.scaled:
            return None
        shares = torch.stack([layer.split for layer in self._stacked if layer.split is not None], dim=-1)
        for layer in self._stacked:
            layer.watched_tau = layer.split = None
        return shares.cpu()

    @torch.no_grad()
    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """A ``[K, r, d_in]`` and B ``[K, d_out, r]`` of each layer as inference uses them, on the CPU."""

        def pairs() -> list[tuple[Tensor, Tensor]]:
            self._template.eval()
            return [adapter.factor_pair() for adapter in self._each_adapter()]

        return [(A.cpu(), B.cpu()) for A, B in self._map(pairs)]


class _Calling(nn.Module):
    """Lets ``functional_call`` put parameters into a module while any function of it runs."""

    def __init__(self, inner: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.inner = inner
        self._function = function

    def forward(self) -> Any:
        return self._function()


def _prefixed(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"inner.{name}": value for name, value in parameters.items()}
