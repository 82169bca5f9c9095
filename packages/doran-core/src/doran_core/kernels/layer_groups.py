"""Which layers can have their weight sides computed together: their parameters, and groups of equal shapes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from doran_core.kernels import torch_internals as internals
from doran_core.kernels.adapted_linear import LayerSide, without_autocast
from doran_core.kernels.backend import Implementation
from doran_core.kernels.passes import passes_of
from doran_core.kernels.weight_side import Product, Shape, Stack, compute
from doran_core.method.experts import RankOneExperts
from doran_core.method.factors import GeneratedFactors, StaticFactors
from doran_core.method.tau import Tau
from doran_core.support.sharding import is_sharded

if TYPE_CHECKING:
    from doran_core.layers.adapter import DoranAdapter
    from doran_core.layers.base import BaseView

__all__ = [
    "LayerGroup",
    "LayerInputs",
    "choose_recomputed",
    "compute_alone",
    "group_layers",
    "has_known_parts",
    "is_ordinary",
    "is_supported",
]

_Slot = tuple[Mapping[str, Any], str]
"""Where a module keeps something: one of its dictionaries, and the name there."""


def is_supported(adapter: DoranAdapter, view: BaseView) -> bool:
    """Whether a layer of this kind and method has a backward by hand."""
    return view.kind in ("linear", "conv1d", "opaque") and adapter.config.norm_method != "direct"


def is_ordinary(tensor: Any) -> bool:
    """Whether a tensor lies in memory now and until the backward pass, and is no subclass with a meaning of its own."""
    return (
        type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0 and not is_sharded(tensor)
    )


class LayerInputs:
    """All that a layer's weight side is made of, as it was when this was made.

    Attributes:
        adapter: the layer's adapter.
        view: of its base layer.
        device: of all of it.
        columns: its trainable tensors by name, the same names for all layers of a group.
        implementation: the backend that was asked for, and what it came to; None before that was looked up.
        key: what the layers of a group have in common.
    """

    def __init__(self, adapter: DoranAdapter, view: BaseView) -> None:
        self.adapter, self.view, self.device = adapter, view, view.device
        factors, tau = adapter.factors, adapter.tau
        columns: dict[str, _Slot] = {"magnitude": (adapter._parameters, "magnitude")}
        if tau.raw is not None:
            columns["tau"] = (tau._parameters if "raw" in tau._parameters else tau._buffers, "raw")
        if adapter.experts is not None:
            columns["coefficients"] = (adapter.experts._parameters, "coefficients")
        modules: list[_Slot] = [(vars(adapter), name) for name in ("config", "scaling")]
        modules += [(adapter._modules, name) for name in ("factors", "tau", "experts")]
        hooked: list[nn.Module] = [factors]
        if isinstance(factors, GeneratedFactors):
            trunk = factors.trunk
            hooked += [trunk, trunk.A, trunk.B]
            modules += [(factors._modules, "trunk"), (factors._modules, "block_embedding")]
            columns |= _network_columns(factors)
        else:
            columns |= {name: (factors._parameters, name) for name in ("A", "B")}
        base = view.layer
        own = [(base._parameters, name) for name in base._parameters] + [(base._buffers, n) for n in base._buffers]
        own += [(adapter._buffers, "base_squared_norm")]
        self._hooks = [hooks for module in hooked for hooks in internals.call_hooks(module)]
        self.columns: dict[str, Any] = {name: slot[0].get(slot[1]) for name, slot in columns.items()}
        self._slots = [(names, name, names.get(name)) for names, name in (*columns.values(), *own, *modules)]
        self.tensors = [value for _, _, value in self._slots if isinstance(value, Tensor)]
        self.is_usable = not any(self._hooks) and all(map(self._fits, self.columns.values())) and self._base_fits()
        self._addresses = [tensor.data_ptr() for tensor in self.tensors] if self.is_usable else []
        self._weight = base._parameters.get("weight") if self.is_usable else None
        self._weight_version = 0 if self._weight is None else internals.version(self._weight)
        self.implementation: tuple[str, Implementation] | None = None
        self.key: tuple[Any, ...] = self._key() if self.is_usable else ()

    def is_random(self) -> bool:
        """Whether a call would draw random numbers: then it draws them itself, so that its recomputation does, too."""
        tau, experts = self.adapter.tau, self.adapter.experts
        if tau.kind == "gaussian" and tau.training:
            return True
        return experts is not None and experts.mask != "none" and experts.training

    def _fits(self, tensor: Any) -> bool:
        magnitude = self.columns["magnitude"]
        return (
            is_ordinary(tensor)
            and tensor.dtype == magnitude.dtype
            and tensor.dtype.itemsize >= 4
            and tensor.device == self.device
            and not tensor.is_inference()
        )

    def _base_fits(self) -> bool:
        own = [*self.view.layer._parameters.values(), *self.view.layer._buffers.values()]
        norm = self.adapter.base_squared_norm
        return (
            norm is not None
            and norm.device == self.device
            and all(tensor is None or (is_ordinary(tensor) and not tensor.is_inference()) for tensor in own)
        )

    def _key(self) -> tuple[Any, ...]:
        adapter, weight, factors = self.adapter, self.view.weight(), self.adapter.factors
        made_by = factors.trunk.A.activation if isinstance(factors, GeneratedFactors) else "static"
        shapes = tuple((name, tensor.shape) for name, tensor in self.columns.items())
        base = None if weight is None else (weight.shape, weight.stride(), weight.dtype)
        method = adapter.config.norm_grad, adapter.config.norm_method, adapter.tau.kind
        return self.device, self.columns["magnitude"].dtype, base, adapter.scaling, method, made_by, shapes

    def weight_is_unwritten(self) -> bool:
        """Whether W0 was not written to since this was made: else ``||W0||^2`` is another."""
        return self._weight is None or internals.version(self._weight) == self._weight_version

    def hold(self) -> bool:
        """Whether every tensor, module and option is the object that it was, where it was, and no hook wants a call."""
        if any(self._hooks):
            return False
        for names, name, value in self._slots:
            if names.get(name) is not value:
                return False
        return [tensor.data_ptr() for tensor in self.tensors] == self._addresses

    def versions(self) -> list[int]:
        """PyTorch's counters of what was written to the tensors."""
        return [internals.version(tensor) for tensor in self.tensors]


def _network_columns(factors: GeneratedFactors) -> dict[str, _Slot]:
    trunk, columns = factors.trunk, {}
    for name, outputs, size in (("A", trunk.output_A, factors.d_in), ("B", trunk.output_B, factors.d_out)):
        part = getattr(trunk, name)
        columns[f"embedding_{name}"] = (part._parameters, "embedding")
        for layer in part.weights._parameters:
            columns[f"w1_{name}_{layer}"] = (part.weights._parameters, layer)
        shared = factors.share_output
        columns[f"w2_{name}"] = (outputs._parameters, str(size)) if shared else (factors._parameters, f"w2_{name}")
    block = factors.block_embedding
    if block is not None:
        columns["block"] = (block._parameters, "vector")
    return columns


def has_known_parts(adapter: DoranAdapter) -> bool:
    """Whether the adapter's modules are this package's own, whose parameters can be read without calling them."""
    return (
        type(adapter.factors) in (StaticFactors, GeneratedFactors)
        and type(adapter.tau) is Tau
        and type(adapter.experts) in (RankOneExperts, type(None))
    )


_stack, _product = internals.apply_directly(Stack), internals.apply_directly(Product)


class LayerGroup:
    """The layers of one shape.

    Args:
        members: their inputs; all of one key.
        implementation: "torch" or "triton".

    Attributes:
        sizes: ``(d_out, d_in)`` of each.
        recomputed: see :attr:`LayerSide.recomputes`, of each.
    """

    def __init__(self, members: Sequence[LayerInputs], implementation: Implementation) -> None:
        self.members, self.implementation = members, implementation
        self.shape = _shape_of([(m.adapter, m.view) for m in members], implementation)
        self.sizes = [(m.view.d_out, m.view.d_in) for m in members]
        self.recomputed = [(False, False)] * len(members)
        self._stacks: dict[str, tuple[list[int], list[Tensor]]] = {}
        for name in members[0].columns:
            every = [member.columns[name] for member in members]
            unique = list({id(tensor): tensor for tensor in every}.values())
            where = {id(tensor): number for number, tensor in enumerate(unique)}
            self._stacks[name] = ([where[id(tensor)] for tensor in every], unique)

    def compute(self) -> list[LayerSide]:
        """The weight sides of the members."""
        used: list[bool] = []
        with without_autocast(self.shape.squared_norm):
            tensors = {name: _stack(used, index, *all_) for name, (index, all_) in self._stacks.items()}
            A, B = self._factors(tensors)
            tau_module, magnitude = self.members[0].adapter.tau, tensors["magnitude"]
            tau = tau_module.value_of(tensors["tau"]) if "tau" in tensors else magnitude.new_zeros(len(A), 1)
            U = None
            if self.shape.weights is None:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.shape.detach_norm):
                    U = torch.stack([m.view.product(a) for m, a in zip(self.members, A.unbind(), strict=True)])
            return compute(self.shape, used, A, B, magnitude, tau, U)

    def _factors(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``A [N, r, d_in]`` and ``B [N, d_out, r]``."""
        factors = self.members[0].adapter.factors
        if not isinstance(factors, GeneratedFactors):
            A, B = tensors["A"], tensors["B"]
        else:
            hidden = []
            offset = tensors.get("block")
            for name in ("A", "B"):
                weights = [tensor for key, tensor in tensors.items() if key.startswith(f"w1_{name}_")]
                embedding = tensors[f"embedding_{name}"]
                embedding = embedding if offset is None else embedding + offset[:, None]
                hidden.append(getattr(factors.trunk, name).features(embedding, weights))
            A = _product(self.shape, hidden[0], tensors["w2_A"].mT)
            B = _product(self.shape, tensors["w2_B"], hidden[1].mT)
        return (tensors["coefficients"][..., None] * A if "coefficients" in tensors else A), B


def _shape_of(layers: Sequence[tuple[DoranAdapter, BaseView]], implementation: Implementation) -> Shape:
    adapter, view = layers[0]
    weights = [view.weight() for _, view in layers]
    norms = torch.stack([adapter.squared_norm_of_base(view) for adapter, view in layers])
    hidden = weights[0] is None
    table = None
    if implementation == "triton" and not hidden:
        table = _address_table(view.device, tuple(weight.data_ptr() for weight in weights))  # type: ignore[union-attr]
    return Shape(
        weights=None if hidden else [weight.detach() for weight in weights],  # type: ignore[union-attr]
        squared_norm=norms,
        has_bias=[view.bias is not None for _, view in layers],
        dtype=norms.dtype if hidden else weights[0].dtype,  # type: ignore[union-attr]
        scaling=adapter.scaling,
        detach_norm=adapter.config.norm_grad == "detached",
        repair=adapter.config.norm_method == "auto" and not hidden,
        passes=passes_of(implementation),
        table=table,
    )


@functools.lru_cache(maxsize=4096)
def _address_table(device: torch.device, addresses: tuple[int, ...]) -> Tensor | None:
    """Addresses as a tensor on the device, without waiting for it; None if kernels could not load from one aligned."""
    if any(address % 16 for address in addresses):
        return None
    table = torch.tensor(addresses, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def group_layers(inputs: Sequence[tuple[LayerInputs, Implementation]]) -> list[LayerGroup]:
    """Groups of equal keys, in the order of their first layers."""
    grouped: dict[Any, list[LayerInputs]] = {}
    for each, implementation in inputs:
        grouped.setdefault((each.key, implementation), []).append(each)
    return [LayerGroup(members, implementation) for (_, implementation), members in grouped.items()]


def compute_alone(adapter: DoranAdapter, view: BaseView, implementation: Implementation) -> LayerSide:
    """One layer's weight side, through its own modules: any generator, and random draws of this call."""
    shape = _shape_of([(adapter, view)], implementation)
    dtype = shape.squared_norm.dtype
    with without_autocast(shape.squared_norm):
        A, B = (factor.to(dtype) for factor in adapter.factor_pair())
        tau = adapter.tau()
        rows = adapter.magnitude.new_full((1,), tau) if isinstance(tau, float) else tau
        U = None
        if shape.weights is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not shape.detach_norm):
                U = view.product(A)[None].to(dtype)
        (side,) = compute(shape, [], A[None], B[None], adapter.magnitude[None].to(dtype), rows[None].to(dtype), U)
    return side


def choose_recomputed(sizes: Sequence[tuple[int, int]], share: float) -> list[bool]:
    """Which layers, by their ``(d_out, d_in)``, compute ``W0 x`` again in the backward pass instead of keeping y.

    A kept output costs d_out numbers a token, and computing it again d_in times as many operations: so those of fewest
    columns come first, and of these those of fewest rows.

    Args:
        sizes: of all layers.
        share: recompute budget as a fraction of the layers' products with W0, forward and backward.
    """
    left = share * 2 * sum(map(operator.mul, *zip(*sizes, strict=True))) if sizes else 0.0
    chosen = [False] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (sizes[i][1], sizes[i][0])):
        work = sizes[index][0] * sizes[index][1]
        if work <= left:
            chosen[index], left = True, left - work
    return chosen
