"""A stack of weights ``[experts, d_out, d_in]`` in one parameter, as mixture-of-experts models have, and its adapter.

Each expert has factors and a magnitude of its own. The formulas are those of :mod:`doran_core.functional`, batched over
the experts; ``B A`` is formed in a merge only. The caller routes tokens to the experts and computes their outputs, with
``(c, A, B')`` from the adapter: one row or matrix per expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from doran_core import functional
from doran_core.errors import ConfigError, TargetError
from doran_core.kernels.adapted_linear import without_autocast
from doran_core.kernels.passes import narrow_on_cuda
from doran_core.kernels.prepare import watch_optimizers
from doran_core.kernels.weight_side import now
from doran_core.layers.adapter import DoranAdapter
from doran_core.layers.base import BaseView
from doran_core.method.config import DoranConfig
from doran_core.method.factors import LayerSpec
from doran_core.support.accumulation import UPCAST_BYTES
from doran_core.support.sharding import is_sharded, is_whole, read, whole_shape
from doran_core.support.torch_internals import own_parameters, uses_fully_shard, version

__all__ = ["StackAdapter", "StackView"]


class StackView(BaseView):
    """One 3-D parameter of a module as matrices ``[experts, d_out, d_in]``.

    Args:
        layer: the module that holds the parameter.
        parameter: the parameter's name in it.
        transposed: the parameter is ``[experts, d_in, d_out]``, as gpt-oss keeps it.
        name: the parameter's name in the model, for error messages.

    Attributes:
        experts: number of matrices.

    Raises:
        TargetError: the parameter does not exist, or is not 3-D in a floating dtype of 16 bits or more.
    """

    def __init__(self, layer: nn.Module, parameter: str, *, transposed: bool = False, name: str = "stack") -> None:
        weight = own_parameters(layer).get(parameter)
        if weight is None:
            raise TargetError(f"{name}: {type(layer).__name__} has no parameter {parameter!r}")
        shape = whole_shape(weight)
        if len(shape) != 3 or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            raise TargetError(
                f"{name}: DoRAN adapts stacked weights [experts, rows, columns] in float16, bfloat16, float32 or "
                f"float64, got {list(shape)} in {weight.dtype}"
            )
        d_out, d_in = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        super().__init__(layer, d_out, d_in)
        self.parameter, self.transposed = parameter, transposed
        self.experts: int = shape[0]
        self.kind = "conv1d" if transposed else "linear"

    @property
    def bias(self) -> None:
        """None: the caller adds biases, which are never scaled."""
        return None

    def weight(self) -> Tensor | None:
        """W0 as a view ``[experts, d_out, d_in]``; None where it is sharded or offloaded."""
        held: Any = own_parameters(self.layer).get(self.parameter)
        plain = type(held) in (Tensor, nn.Parameter) and not held.is_meta and held.dim() == 3
        whole = plain and is_whole(held, self.experts * self.d_out * self.d_in)
        return self.matrix(held) if whole else None

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        raise TargetError(f"{type(self.layer).__name__}: a stack of experts has no one input; its caller routes tokens")

    def compute_dtype(self) -> torch.dtype:
        weight: Tensor = getattr(self.layer, self.parameter)
        return weight.dtype


class StackAdapter(DoranAdapter):
    """DoRAN of a stack: for each expert ``y = c * (W0 x + g B A x)`` with ``c = m / (||W0 + g B A|| + tau)``.

    The tensors are those of a :class:`DoranAdapter` with a further first dimension, of experts. tau is one for all
    experts, one per expert or one per row.

    Args:
        config: the method's options, without rank-one experts (MLAE).
        spec: of the stack; has ``experts``.
        factors: the module whose call gives ``(A [experts, r, d_in], B [experts, d_out, r])``.

    Raises:
        ConfigError: the options do not apply to a stack.
    """

    def __init__(self, config: DoranConfig, spec: LayerSpec, factors: nn.Module) -> None:
        if spec.experts is None:
            raise ConfigError(f"{spec.name}: a stack needs a LayerSpec with experts")
        if config.experts:
            raise ConfigError(
                f"{spec.name}: experts=True reads B A as rank-one experts (MLAE), which is for single matrices, "
                "not for stacked expert weights"
            )
        super().__init__(config, spec, factors)
        self._cache = _WeightSideCache()

    def _squared_norm(self, weight: Tensor) -> Tensor:
        return torch.stack([functional.base_squared_norm(matrix) for matrix in weight])

    def _norm(self, view: BaseView, A: Tensor, B: Tensor) -> Tensor:
        return self._norm_of(view, A, B, None)

    def _norm_of(self, view: BaseView, A: Tensor, B: Tensor, chosen: Tensor | None) -> Tensor:
        """The norms ``[experts, d_out]``; for experts that are not chosen, the base weight's norms."""
        weight = view.weight()
        if weight is None:
            raise TargetError(
                f"{self.spec.name}: its weight is whole only inside its module's own forward pass "
                "(ZeRO-3, a sharding unit of its own, offload)"
            )
        squared_norm = self.squared_norm_of_base(view)
        if chosen is None:
            return self._norm_of_experts(weight, squared_norm, A, B, torch.arange(len(weight), device=A.device))
        norm = self._norm_of_experts(weight, squared_norm[chosen], A[chosen], B[chosen], chosen)
        return functional.start_norm(squared_norm).to(norm.dtype).index_copy(0, chosen, norm)

    def _norm_of_experts(self, weight: Tensor, squared_norm: Tensor, A: Tensor, B: Tensor, experts: Tensor) -> Tensor:
        """``||W0 + g B A||`` ``[k, d_out]`` of the k experts whose squared norms and factors are given."""
        if self.config.norm_method == "direct":
            rows = [
                functional.row_norm(weight[expert], A[i], B[i], self.scaling)
                for i, expert in enumerate(experts.tolist())
            ]
            return torch.stack(rows)
        every = len(experts) == len(weight)
        product = _stacked_product(weight, A, None if every else experts)
        norm = functional.factored_row_norm(squared_norm, product, A, B, self.scaling)
        if self.config.norm_method != "auto":
            return norm
        lost = functional.cancelled_rows(norm.flatten(), squared_norm.flatten())
        if lost.numel() == 0:
            return norm
        place, row = lost // self.spec.d_out, lost % self.spec.d_out
        direct = [
            functional.row_norm(weight[experts[p], r][None], A[p], B[p, r][None], self.scaling)
            for p, r in zip(place.tolist(), row.tolist(), strict=True)
        ]
        return norm.index_put((place, row), torch.cat(direct).to(norm.dtype))

    def scale_and_factors(self, view: BaseView, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(c [experts, d_out], A [experts, r, d_in], B' [experts, d_out, r])`` of this pass.

        Args:
            view: of the base weight.
            chosen: indices of the experts that this pass uses, each once; None for all. Only these norms are computed:
                do not use the values returned for other experts.
        """
        with without_autocast(self.magnitude):
            A, B = self.factor_pair()
            if self.config.norm_grad == "detached":
                with torch.no_grad():
                    norm = self._norm_of(view, A, B, chosen)
            else:
                norm = self._norm_of(view, A, B, chosen)
            scale = self.output_scale(norm)
            return scale, A, functional.scaled_factor(B, scale, self.scaling)

    def weight_side(self, view: BaseView, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Like :meth:`scale_and_factors`. Without gradients, all experts are cached until an input changes.

        As for ordinary layers, writes that PyTorch does not count need ``doran_core.kernels.refresh()``.
        """
        state = None if torch.is_grad_enabled() else self._state(view)
        if state is None:
            self._cache.clear()
            return self.scale_and_factors(view, chosen)
        if self._cache.state != state:
            self._cache.clear()  # free the old tensors before the new ones are computed
            watch_optimizers()
            self._cache.side, self._cache.state = self.scale_and_factors(view), state
        assert self._cache.side is not None
        return self._cache.side

    def _state(self, view: BaseView) -> tuple[object, ...] | None:
        """Changes when an input of the weight side does; None if changes cannot be seen, or the side is random."""
        tensors = [tensor for tensor in (*self.parameters(), *self.buffers()) if tensor is not self.base_squared_norm]
        weight = view.weight()
        plain = (Tensor, nn.Parameter)
        ordinary = all(type(t) in plain and not t.is_inference() and not is_sharded(t) for t in tensors)
        random = self.training and self.config.tau_kind == "gaussian"
        if weight is None or weight.is_inference() or not ordinary or random or uses_fully_shard():
            return None
        return now(), weight.data_ptr(), version(weight), *((t.data_ptr(), version(t), t.dtype) for t in tensors)

    def forward(self, view: BaseView, x: Tensor, base_output: Tensor | None = None) -> Tensor:
        """Not defined: a stack has no one input."""
        raise TargetError(f"{self.spec.name}: a stack of experts is not called; its caller routes tokens")

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """W' ``[experts, d_out, d_in]`` in float64, from W0 of the same shape; masks and noise as at inference."""
        with self.inference_mode_of_method():
            A, B = self.factor_pair()
        magnitude, tau = read(self.magnitude), self.tau.value()
        merged = torch.empty(weight.shape, dtype=torch.float64, device=weight.device)
        for expert, matrix in enumerate(weight):
            own = tau[expert] if tau.dim() == 2 else tau
            functional.merged_weight(
                matrix, A[expert], B[expert], self.scaling, magnitude[expert], own, out=merged[expert]
            )
        return merged

    def extra_repr(self) -> str:
        return f"experts={self.spec.experts}, {super().extra_repr()}"


class _WeightSideCache:
    """A weight side and the state in which it was computed. Copies and pickles of a model get an empty cache."""

    def __init__(self) -> None:
        self.side: tuple[Tensor, Tensor, Tensor] | None = None
        self.state: tuple[object, ...] | None = None

    def clear(self) -> None:
        """Free the tensors."""
        self.side = self.state = None

    def __reduce__(self) -> tuple[type[_WeightSideCache], tuple[()]]:
        return _WeightSideCache, ()


def _stacked_product(weight: Tensor, A: Tensor, experts: Tensor | None) -> Tensor:
    """``U = W0 @ A^T`` of all or some experts, in float32 or wider, without a copy of all of W0.

    Args:
        weight: ``[experts, d_out, d_in]``, frozen.
        A: ``[k, r, d_in]``.
        experts: the indices ``[k]`` of A's experts; None for all.

    Returns:
        ``[k, d_out, r]``.
    """
    dtype = functional.accumulation_dtype(weight, A)
    if weight.dtype == dtype and experts is None:
        return weight @ A.to(dtype).mT
    product: Tensor = _FrozenStackProduct.apply(weight, A.to(dtype), experts)  # type: ignore[no-untyped-call]
    return product


class _FrozenStackProduct(torch.autograd.Function):
    """The product of A with some experts of W0, in pieces. Only A gets gradients; W0 is saved without a copy."""

    @staticmethod
    def forward(weight: Tensor, A: Tensor, experts: Tensor | None) -> Tensor:
        return torch.cat([_batched_product(matrices, A[part].mT) for part, matrices in _pieces(weight, experts)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        weight, _, ctx.experts = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, Tensor, None]:
        (weight,) = ctx.saved_tensors
        (grad,) = grad_outputs
        pieces = _pieces(weight, ctx.experts)
        return None, torch.cat([_batched_product(matrices.mT, grad[part]).mT for part, matrices in pieces]), None


def _batched_product(matrices: Tensor, thin: Tensor) -> Tensor:
    """``matrices @ thin`` in the dtype of `thin`. A GPU rounds `thin` to half precision, as the layer's branch does."""
    if narrow_on_cuda(matrices):
        return torch.bmm(matrices, thin.to(matrices.dtype), out_dtype=torch.float32)
    return matrices.to(thin.dtype) @ thin


def _pieces(weight: Tensor, experts: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the chosen experts with their matrices; a few, at least one, where the product copies them."""
    count = len(weight) if experts is None else len(experts)
    copies = experts is not None or not narrow_on_cuda(weight)
    step = max(1, UPCAST_BYTES // max(1, weight[0].numel() * 4)) if copies else count
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        yield part, weight[part] if experts is None else weight[experts[part]]
