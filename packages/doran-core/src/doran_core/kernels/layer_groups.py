"""Which layers can have their weight sides computed together: their parameters, and groups of equal shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from doran_core.kernels.adapted_linear import LayerSide, small_scale, without_autocast
from doran_core.kernels.backend import Implementation, choose
from doran_core.kernels.passes import Shape, passes_of
from doran_core.kernels.weight_side import Product, Stack, compute
from doran_core.method.experts import RankOneExperts
from doran_core.method.factors import GeneratedFactors, StaticFactors
from doran_core.method.tau import Tau
from doran_core.support import torch_internals as internals
from doran_core.support.sharding import is_sharded

if TYPE_CHECKING:
    from doran_core.layers.adapter import DoranAdapter
    from doran_core.layers.base import BaseView

__all__ = [
    "LayerGroup",
    "LayerInputs",
    "can_be_read",
    "choose_recomputed",
    "compute_alone",
    "group_layers",
    "implementation_of",
    "is_ordinary",
    "requires_grad",
]

_Slot = tuple[dict[str, Any], str]
"""Where a module keeps something: one of its dictionaries, and the name there."""

requires_grad: Callable[[Tensor], bool] = operator.attrgetter("requires_grad")
_is_training: Callable[[nn.Module], bool] = operator.attrgetter("training")
_own = internals.own_parameters


def _is_supported(adapter: DoranAdapter, view: BaseView, weight: Tensor | None) -> bool:
    """Whether a layer of this kind and method has a backward by hand, and its W0, unless hidden, can be read."""
    kind_fits = view.kind in ("linear", "conv1d", "opaque") and adapter.config.norm_method != "direct"
    return kind_fits and (weight is None or is_ordinary(weight))


def is_ordinary(tensor: Any) -> bool:
    """Whether a tensor lies in memory now and until the backward pass, and is no subclass with a meaning of its own."""
    return type(tensor) in (Tensor, nn.Parameter) and _lies_in_memory(tensor)


def _lies_in_memory(tensor: Tensor) -> bool:
    """Whether a tensor has an address and a counter of writes, as bitsandbytes' packed weights do."""
    has_own_operations = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return not (has_own_operations or tensor.is_meta or tensor.numel() == 0 or is_sharded(tensor))


def _tensors_within(holder: Any, depth: int = 4) -> Iterator[Tensor]:
    """All tensors that a layer holds, those in attributes of its tensors and states too: a packed weight's scales."""
    for value in (holder if isinstance(holder, dict) else vars(holder)).values():
        if isinstance(value, Tensor) and _lies_in_memory(value) and not value.is_inference():
            yield value
        if depth and (isinstance(value, dict) or hasattr(value, "__dict__")) and not callable(value):
            yield from _tensors_within(value, depth - 1)


class LayerInputs:
    """All that a layer's weight side is made of, as it was when this was made.

    Attributes:
        adapter: the layer's adapter.
        view: of its base layer.
        device: of all of it.
        dtype: of W0, or that of magnitude where W0 is hidden or magnitude is wider than float32.
        columns: its trainable tensors by name, the same names for all layers of a group.
        is_usable: whether an implementation other than the reference can read it all, now and at the next call.
        key: what the layers of a group have in common.
        seen: :meth:`versions` before the weight side was computed from them.
    """

    def __init__(self, adapter: DoranAdapter, view: BaseView) -> None:
        self.adapter, self.view, self.device = adapter, view, view.device
        tau, experts, factors = adapter.tau, adapter.experts, adapter.factors
        self._draws: list[nn.Module] = [tau] if tau.kind == "gaussian" else []
        columns: dict[str, _Slot] = {"magnitude": (_own(adapter), "magnitude")}
        if tau.raw is not None:
            columns["tau"] = (_own(tau) if "raw" in _own(tau) else internals.own_buffers(tau), "raw")
        if experts is not None:
            columns["coefficients"] = (_own(experts), "coefficients")
            self._draws += [] if experts.mask == "none" else [experts]
        others: list[_Slot] = [(vars(adapter), name) for name in ("config", "scaling")]
        others += [(internals.own_modules(adapter), name) for name in ("factors", "tau", "experts")]
        hooked: list[nn.Module] = [factors]
        if isinstance(factors, GeneratedFactors):
            hooked += [factors.trunk, factors.trunk.A, factors.trunk.B]
            others += [(internals.own_modules(factors), name) for name in ("trunk", "block_embedding")]
            columns |= _network_columns(factors)
        else:
            columns |= {name: (_own(factors), name) for name in ("A", "B")}
        base = [_own(view.layer), internals.own_buffers(view.layer)]
        others += [(names, name) for names in base for name in names]
        others += [(internals.own_buffers(adapter), "base_squared_norm")]
        self.columns: dict[str, Any] = {name: slot[0].get(slot[1]) for name, slot in columns.items()}
        # Three lists beside each other and the hooks' dictionaries: compared at each use without a loop in Python.
        self._places, self._names = zip(*columns.values(), *others, strict=True)
        self._values = list(map(dict.get, self._places, self._names))
        self._hooks = [hooks for module in hooked for hooks in internals.call_hooks(module)]
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._frozen = [tensor for names in base for tensor in names.values() if isinstance(tensor, Tensor)]
        self.is_usable = not any(self._hooks) and all(map(self._fits, self.columns.values())) and self._base_fits()
        self._addresses = list(map(Tensor.data_ptr, self._tensors)) if self.is_usable else []
        self._weight = base[0].get("weight") if self.is_usable else None
        self._weight_version = 0 if self._weight is None else internals.version(self._weight)
        weight, self.dtype = view.weight(), self.columns["magnitude"].dtype
        self._hiding_layer = view.layer if weight is None else None
        self._within: list[Tensor] = []
        if weight is not None and self.dtype.itemsize <= 4:
            self.dtype = weight.dtype
        self.key: tuple[Any, ...] = self._key(weight) if self.is_usable else ()
        self.seen: list[int] | None = None

    def is_random(self) -> bool:
        """Whether a call draws random numbers (a gaussian tau, expert masks in training): the layer then draws alone.

        Reentrant checkpointing repeats a block from the generator's state at the block's start. Numbers drawn for all
        layers at the start of the pass would not be drawn again there: the gradients would be those of other numbers.
        """
        return any(map(_is_training, self._draws))

    def implementation(self, dtype: torch.dtype) -> Implementation:
        """The implementation for an input of this dtype, by the backend that is asked for now.

        Raises:
            BackendError: it was asked for by name and cannot run on these tensors.
        """
        return choose(self.device, self.dtype if self.dtype.itemsize > 4 else dtype)

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
        norm = self.adapter.base_squared_norm
        if norm is None or norm.device != self.device or any(map(requires_grad, self._frozen)):
            return False
        return all(_lies_in_memory(tensor) and not tensor.is_inference() for tensor in self._frozen)

    def _key(self, weight: Tensor | None) -> tuple[Any, ...]:
        adapter, factors = self.adapter, self.adapter.factors
        made_by = factors.trunk.A.activation if isinstance(factors, GeneratedFactors) else "static"
        shapes = tuple((name, tensor.shape) for name, tensor in self.columns.items())
        base = None if weight is None else (weight.shape, weight.stride(), weight.dtype)
        method = adapter.config.norm_grad, adapter.config.norm_method, adapter.tau.kind
        return self.device, self.columns["magnitude"].dtype, base, adapter.scaling, method, made_by, shapes

    def weight_is_unwritten(self) -> bool:
        """Whether W0 was not written to since this was made: else ``||W0||^2`` is another."""
        return self._weight is None or internals.version(self._weight) == self._weight_version

    def versions(self) -> list[int] | None:
        """PyTorch's counters of writes to the tensors; of a layer that hides W0 also all tensors that it holds.

        None unless every tensor, module and option is the object that it was, where it was, no hook wants a call, and
        the base layer is frozen.
        """
        same = all(map(operator.is_, map(dict.get, self._places, self._names), self._values))
        if not same or any(self._hooks) or any(map(requires_grad, self._frozen)):
            return None
        if list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            return None
        versions = list(map(internals.version, self._tensors))
        if self._hiding_layer is not None:
            self._within = list(_tensors_within(self._hiding_layer))  # kept, so that another tensor has another id
            versions += [number for t in self._within for number in (id(t), t.data_ptr(), internals.version(t))]
        return versions


def _network_columns(factors: GeneratedFactors) -> dict[str, _Slot]:
    trunk = factors.trunk
    columns: dict[str, _Slot] = {}
    for name, outputs, size in (("A", trunk.output_A, factors.d_in), ("B", trunk.output_B, factors.d_out)):
        part = getattr(trunk, name)
        columns[f"embedding_{name}"] = (_own(part), "embedding")
        columns |= {f"w1_{name}_{layer}": (_own(part.weights), layer) for layer in _own(part.weights)}
        columns[f"w2_{name}"] = (_own(outputs), str(size)) if factors.share_output else (_own(factors), f"w2_{name}")
    if factors.block_embedding is not None:
        columns["block"] = (_own(factors.block_embedding), "vector")
    return columns


def can_be_read(adapter: DoranAdapter, view: BaseView) -> bool:
    """Whether the adapter's modules are this package's own, whose parameters can be read without calling them."""
    return (
        _is_supported(adapter, view, view.weight())
        and type(adapter.factors) in (StaticFactors, GeneratedFactors)
        and type(adapter.tau) is Tau
        and type(adapter.experts) in (RankOneExperts, type(None))
    )


def implementation_of(adapter: DoranAdapter, view: BaseView, x: Tensor) -> Implementation:
    """The implementation for a call. The reference computes what the others do not.

    Embeddings and convolutions, a trained weight or bias, a norm that is to be taken directly, tensor subclasses
    (DTensor), sharded or missing parameters, and DataParallel's replicas.

    Raises:
        BackendError: an implementation was asked for by name and cannot run on these tensors.
    """
    magnitude, weight = adapter.magnitude, view.weight()
    if not _is_supported(adapter, view, weight) or not is_ordinary(magnitude) or magnitude.dtype.itemsize < 4:
        return "reference"
    bias = view.bias
    trained = (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    if trained or internals.is_replica(adapter):
        return "reference"
    return choose(x.device, magnitude.dtype if magnitude.dtype == torch.float64 else x.dtype)


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
            U = _products_of_calls(self.shape, [member.view for member in self.members], A)
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


def _products_of_calls(shape: Shape, views: Sequence[BaseView], A: Tensor) -> Tensor | None:
    """``U = W0 A^T [N, d_out, r]`` from the layers' own calls, where W0 is hidden; else None."""
    if shape.weights:
        return None
    with torch.set_grad_enabled(torch.is_grad_enabled() and not shape.detach_norm):
        return torch.stack([view.product(a) for view, a in zip(views, A.unbind(), strict=True)]).to(A.dtype)


def _shape_of(layers: Sequence[tuple[DoranAdapter, BaseView]], implementation: Implementation) -> Shape:
    adapter = layers[0][0]
    weights = [view.weight() for _, view in layers]
    norms = torch.stack([adapter.squared_norm_of_base(view) for adapter, view in layers])
    hidden = weights[0] is None
    dtype = norms.dtype if hidden else weights[0].dtype  # type: ignore[union-attr]
    return Shape(
        weights=[] if hidden else [weight.detach() for weight in weights],  # type: ignore[union-attr]
        squared_norm=norms,
        least_scales=[small_scale(dtype, has_bias=view.bias is not None) for _, view in layers],
        dtype=dtype,
        scaling=adapter.scaling,
        detach_norm=adapter.config.norm_grad == "detached",
        repair=adapter.config.norm_method == "auto" and not hidden,
        passes=passes_of(implementation),
    )


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
        U = _products_of_calls(shape, [view], A[None])
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
