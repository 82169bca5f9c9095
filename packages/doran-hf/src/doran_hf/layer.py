"""DoranLayer: a base layer with several named DoRAN adapters, by PEFT's interface. The math is doran_core's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from doran_core.errors import ConfigError, TargetError
from doran_core.layers import BaseView, DoranAdapter, WeightSwap, base_view
from doran_core.layers.adapter import note_loading
from doran_core.layers.modules import layer_spec
from doran_core.method.config import DoranConfig as CoreConfig
from doran_core.method.factors import FactorBuilder
from doran_core.support.torch_internals import own_modules, own_parameters
from doran_hf.mixed_batch import check_rows

__all__ = [
    "Conv2dDoranLayer",
    "ConvDoranLayer",
    "DoranLayer",
    "EmbeddingDoranLayer",
    "LinearDoranLayer",
    "check_adapter",
    "doran_layers",
    "layer_class",
]


class DoranLayer(nn.Module, BaseTunerLayer):
    """A frozen base layer and its adapters: linear, Conv1D, embedding, convolution or quantized linear.

    The changes of several active adapters add up: in the output, or in the weight if merged.

    Args:
        base_layer: the layer to adapt.
        name: its name in the base model; it decides rank, scaling and sharing group.

    Raises:
        TargetError: if doran_core cannot adapt the layer.
    """

    adapter_layer_names = ("doran_adapter",)
    other_param_names = ()
    adapter_class: type[DoranAdapter] = DoranAdapter

    # BaseTunerLayer's own, for a type checker that does not read PEFT.
    active_adapters: list[str]
    merged: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._prepare(base_view(base_layer, name), name)

    def _prepare(self, view: BaseView, name: str) -> None:
        self.in_features, self.out_features = view.d_in, view.d_out
        self.name = name
        self.doran_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._swap = WeightSwap()
        self._view: tuple[BaseView, bool] | None = None

    @property
    def view(self) -> BaseView:
        """The base layer as a matrix ``[d_out, d_in]``; checked anew if the layer was exchanged or quantized."""
        layer = own_modules(self)["base_layer"]
        while "base_layer" in own_modules(layer):  # another method's layer, around which PEFT has put this one
            layer = own_modules(layer)["base_layer"]
        weight = own_parameters(layer).get("weight")
        # None under FSDP1, which puts the weight elsewhere for each pass. Another floating dtype is mixed precision.
        packed = weight is not None and not (weight.dtype.is_floating_point and weight.dtype.itemsize > 1)
        if self._view is None or self._view[0].layer is not layer or self._view[1] != packed:
            self._view = base_view(layer, self.name), packed
        return self._view[0]

    @property
    def parameter_name(self) -> str:
        """The adapted parameter's name in the base model."""
        return f"{self.name}.weight"

    def original_weight(self) -> Tensor | None:
        """W0 ``[d_out, d_in]``, also while adapters are merged; None if the layer gives no access to it."""
        return self._swap.original(self.view)

    def whole_weight(self) -> AbstractContextManager[Tensor | None]:
        """A context that yields W0 as :meth:`original_weight` does, gathered from all processes if it is sharded."""
        return self._swap.whole_original(self.view)

    def base_digest(self, adapter_name: str) -> bytes | None:
        """Digest of W0; of a sharded W0, the digest taken with its norm. None if W0 is quantized or float16."""
        return self.adapter(adapter_name).digest_of_base(self._swap, self.view)

    def add(self, adapter_name: str, config: CoreConfig, builder: FactorBuilder, *, inference_mode: bool) -> None:
        """Make a new adapter that leaves the output as it is.

        Args:
            adapter_name: its name.
            config: the method's options.
            builder: makes the factors; one for all layers of this adapter, since it knows the sharing groups.
            inference_mode: do not train it.
        """
        if self.merged:
            warnings.warn("An adapter cannot be added while others are merged: unmerging them first.", stacklevel=2)
            self.unmerge()
        view = self.view
        spec = layer_spec(self.name, view, config)
        adapter = self.adapter_class(config, spec, builder(spec))
        if not adapter.magnitude.is_meta:  # on the meta device the values come with the saved tensors
            adapter.to(view.device)
            adapter.initialise(view)
        self.doran_adapter[adapter_name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT takes the weight's device, which is "meta" if accelerate loads the weight for each call.
        super()._move_adapter_to_device_of_base_layer(adapter_name, self.view.device if device is None else device)

    def adapter(self, name: str) -> DoranAdapter:
        """The adapter of this name."""
        return cast(DoranAdapter, self.doran_adapter[name])

    def adapter_in_use(self) -> tuple[DoranAdapter, BaseView] | None:
        """The active adapter and the base layer, for the next call; None unless exactly one adapter is active."""
        adapters = self._adapters_in_use()
        return (adapters[0], self.view) if len(adapters) == 1 else None

    def _adapters_in_use(self) -> list[DoranAdapter]:
        """The adapters whose changes a call adds to the output: the active ones, none while disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        adapters = own_modules(own_modules(self)["doran_adapter"])
        return [adapters[name] for name in self.active_adapters if name in adapters]

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The adapted output, of the shape and dtype of the base layer's.

        Args:
            x: the base layer's input, ``[batch, ...]`` with ``adapter_names``.
            args: passed on to the base layer.
            adapter_names: inference only: the adapter of each row of x, "__base__" for none; see
                :func:`doran_hf.mixed_batch.adapter_per_row`.
            kwargs: passed on to the base layer.

        Raises:
            ConfigError: ``adapter_names`` of another length than x, or while adapters are merged.
        """
        if self.merged and self.disable_adapters:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            check_rows(self.name, len(x), adapter_names, merged=self.merged)
            return self._forward_rows(x, self.base_layer(x, *args, **kwargs), adapter_names)
        adapters, base_layer = self._adapters_in_use(), own_modules(self)["base_layer"]
        view = self.view if adapters else None
        if view is not None and len(adapters) == 1 and not args and not kwargs and view.layer is base_layer:
            alone: Tensor = adapters[0](view, x)  # the adapter calls the base layer itself, which saves a copy
            return alone
        base_output: Tensor = base_layer(x, *args, **kwargs)
        if view is None:
            return base_output
        outputs: list[Tensor] = [adapter(view, x, base_output) for adapter in adapters]
        output = outputs[0]
        for other in outputs[1:]:
            output = output + (other - base_output)
        return output

    def _forward_rows(self, x: Tensor, base_output: Tensor, adapter_names: Sequence[str]) -> Tensor:
        output, view = base_output.clone(), self.view
        for name in dict.fromkeys(adapter_names):
            if name in self.doran_adapter:
                rows = torch.tensor([row for row, of in enumerate(adapter_names) if of == name], device=x.device)
                output[rows] = self.adapter(name)(view, x[rows], base_output[rows])
        return output

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """``W' - W0`` as the base layer keeps its weight, float32; for PEFT's ``convert_to_lora``.

        Raises:
            TargetError: if the layer gives no access to its weight.
        """
        weight = self.original_weight()
        if weight is None:
            raise TargetError(f"{self.name}: {type(self.get_base_layer()).__name__} gives no access to its weight")
        return self.view.stored(self.adapter(adapter_name).merged_weight(weight) - weight.double()).float()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``convert_to_lora`` can approximate the change of the weight: it does so for linear layers."""
        return adapter_name in self.doran_adapter and self.view.kind in ("linear", "conv1d")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapted weight in place of W0 and keep W0, so that :meth:`unmerge` is exact to the bit.

        Args:
            safe_merge: refuse a merged weight with NaN or infinite values.
            adapter_names: the adapters to merge; None for all active ones.

        Raises:
            NonFiniteError: see safe_merge; the base weight is left as it was.
            TargetError: if the layer gives no access to its weight.
        """
        wanted = check_adapters_to_merge(self, adapter_names)
        names = [name for name in wanted if name in self.doran_adapter]
        if not names:
            return
        view = self.view
        self._swap.check(view, self.name)
        with self.whole_weight() as original:
            everything = [*self.merged_adapters, *names]
            merged = torch.empty(0) if original is None else self._merged_weight(original, everything)
        self._swap.put(view, merged, f"{self.name}, merging {names}", check_finite=safe_merge)
        self.merged_adapters.extend(names)

    def _merged_weight(self, original: Tensor, names: list[str]) -> Tensor:
        """W' of one adapter, or W0 plus the sum of the changes of several; float64."""
        weight = self.adapter(names[0]).merged_weight(original)
        for name in names[1:]:
            weight += self.adapter(name).merged_weight(original) - original.double()
        return weight

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W0 back, bit for bit."""
        if not self._swap.active:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._swap.restore(self.view)
        self.merged_adapters.clear()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self._swap.refuse_loading(self.name, state_dict, prefix)
        note_loading(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"doran.{super().__repr__()}"


class LinearDoranLayer(DoranLayer):
    """DoRAN around nn.Linear, a Conv1D or a quantized linear layer. x ``[..., d_in]`` to ``[..., d_out]``.

    PEFT recognises by "Linear" in the class's name that "all-linear" includes this layer for a second adapter.
    """


class EmbeddingDoranLayer(DoranLayer):
    """DoRAN around nn.Embedding. Tokens ``[...]`` to ``[..., embedding_dim]``."""


class Conv2dDoranLayer(DoranLayer):
    """DoRAN around nn.Conv2d."""


class ConvDoranLayer(DoranLayer):
    """DoRAN around nn.Conv1d or nn.Conv3d."""


def layer_class(base_layer: nn.Module, name: str) -> type[DoranLayer]:
    """The class that fits a base layer.

    Raises:
        TargetError: if doran_core cannot adapt the layer.
    """
    kinds: dict[str, type[DoranLayer]] = {
        "embedding": EmbeddingDoranLayer,
        "conv2d": Conv2dDoranLayer,
        "conv": ConvDoranLayer,
    }
    return kinds.get(base_view(base_layer, name).kind, LinearDoranLayer)


def doran_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[DoranLayer]:
    """The layers of a model that DoRAN adapts, in the model's order; with a name, those that have that adapter."""
    for module in model.modules():
        if isinstance(module, DoranLayer) and (adapter_name is None or adapter_name in module.doran_adapter):
            yield module


def check_adapter(model: nn.Module, adapter_name: str | None = None) -> None:
    """Refuse a model without DoRAN adapters, or without the one that is asked for.

    Raises:
        ConfigError: no layer has a DoRAN adapter, or none has one of this name.
    """
    names = {name for layer in doran_layers(model) for name in layer.doran_adapter}
    if not names:
        raise ConfigError(f"model: {type(model).__name__} has no DoRAN adapter")
    if adapter_name is not None and adapter_name not in names:
        raise ConfigError(f"adapter_name: no DoRAN adapter {adapter_name!r}; there are {sorted(names)}")
