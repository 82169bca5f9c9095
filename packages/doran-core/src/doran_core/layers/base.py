"""Views of base layers as one matrix ``[d_out, d_in]``. DoRAN needs nothing else of a base layer.

A view holds a reference and no state, so it can be made at any time and never goes stale. Making one checks the layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doran_core import functional
from doran_core.errors import TargetError
from doran_core.layers.supported import Convolution, check_supported, has_matrix, is_transposed
from doran_core.support.sharding import gathered, held, is_flattened, is_whole, offload_hook, whole, whole_shape
from doran_core.support.torch_internals import convolve, is_observed, own_parameters, storage_of, version

__all__ = ["BaseView", "ModuleKind", "base_view"]

ModuleKind = Literal["linear", "conv1d", "conv2d", "conv", "embedding", "opaque"]


class BaseView(ABC):
    """A base layer as the matrix W0 ``[d_out, d_in]`` and the products with it.

    Attributes:
        layer: the base layer.
        layer_type: the layer's class when the view was made; a parametrization changes the class.
        kind: the kind of layer.
        d_out: rows of the matrix.
        d_in: columns of the matrix.
        channel_dim: the output's dimension of size ``d_out``.
        parameter: the name of the layer's weight.
        experts: the number of matrices of a stack; None for one matrix.
    """

    kind: ModuleKind = "linear"
    channel_dim: int = -1
    parameter: str = "weight"
    experts: int | None = None

    def __init__(self, layer: nn.Module, d_out: int, d_in: int) -> None:
        self.layer = layer
        self.layer_type = type(layer)
        self.d_out = d_out
        self.d_in = d_in

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[d_out]`` that the base layer's output contains, or None.

        Raises:
            TargetError: it is sharded and trained.
        """
        bias = held(self.layer, "bias")
        if not isinstance(bias, Tensor):
            return None
        return bias if is_whole(bias, self.d_out) else self._bias_of_call(bias)

    def _bias_of_call(self, bias: Tensor) -> Tensor:
        """A sharded or offloaded bias, computed as the layer's output for zeros."""
        if bias.requires_grad:
            raise TargetError(f"{type(self.layer).__name__}: a sharded bias cannot be trained here; use bias='none'")
        with torch.no_grad():
            zeros = torch.zeros(1, self.d_in, dtype=self.compute_dtype(), device=self.device)
            return self.layer(zeros)[0]  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """The base layer's device."""
        place = getattr(offload_hook(self.layer), "execution_device", None)
        tensors = [*self.layer.parameters(), *self.layer.buffers()]
        if tensors and tensors[0].is_meta and place is not None:
            return torch.device(place)
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def is_plain(self) -> bool:
        """Whether a call of the layer only computes ``F.linear(x, weight, bias)``, without hooks."""
        return False

    def weight(self) -> Tensor | None:
        """W0 as a view ``[d_out, d_in]``; None if the layer gives no access to W0, or only inside its own forward.

        Sharded and offloaded layers give access inside their forward only: use :meth:`whole_weight`.
        """
        weight = held(self.layer, self.parameter)
        return self.matrix(weight) if is_whole(weight, self.d_out * self.d_in) else None

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as ``[d_out, d_in]``; the inverse of :meth:`stored`."""
        return weight

    @contextmanager
    def whole_weight(self) -> Iterator[Tensor | None]:
        """W0 ``[d_out, d_in]``; None if quantized. A sharded W0 is gathered, so all processes must call this.

        Raises:
            TargetError: FSDP1 has sharded the weight.
        """
        with gathered(self.layer):
            self.refuse_flattened()
            yield self.matrix(whole(held(self.layer, self.parameter), type(self.layer).__name__))

    def refuse_flattened(self) -> None:
        """Raise TargetError if FSDP1 has sharded the layer's parameters into its flat parameter."""
        weight = own_parameters(self.layer).get(self.parameter)
        if weight is not None and weight.dim() == 1 and is_flattened(weight):
            raise TargetError(
                f"{type(self.layer).__name__}: its parameters are sharded by FSDP1; call this inside "
                "FullyShardedDataParallel.summon_full_params(model)"
            )

    @abstractmethod
    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """``B A`` applied to the layer's input x. The result has the shape of the base output."""

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix ``[d_out, d_in]`` in the layer's stored shape."""
        return matrix

    def weight_version(self) -> tuple[object, ...] | None:
        """A value that changes when W0 is replaced, moved, cast or written to; None if W0 is hidden, or FSDP1 replaces
        it in each pass.

        PyTorch does not count writes through ``weight.data``: call ``DoranAdapter.reset_base`` after one.
        """
        if self.weight() is None or self.parameter in vars(self.layer):
            return None
        weight = cast(Tensor, getattr(self.layer, self.parameter))
        written = 0 if weight.is_inference() else version(weight)
        return storage_of(weight), weight.storage_offset(), written, weight.dtype

    @property
    def weight_trains(self) -> bool:
        """Whether W0 is a parameter that trains. PyTorch does not count what fused optimizers and FSDP2 write to it."""
        weight = own_parameters(self.layer).get(self.parameter)
        return weight is not None and weight.requires_grad

    def product(self, A: Tensor) -> Tensor:
        """``U = W0 @ A.T``, ``[d_out, r]``, differentiable in A ``[r, d_in]``."""
        weight = self.weight()
        if weight is not None:
            return functional.base_product(weight, A)
        return self._product_of_call(A)

    def _product_of_call(self, A: Tensor) -> Tensor:
        """:meth:`product` for a hidden W0: calls the layer with A's rows, so that hooks that gather W0 run."""
        return self._apply_base(A.to(self.compute_dtype())).to(functional.accumulation_dtype(A)).T

    def _apply_base(self, rows: Tensor) -> Tensor:
        """``rows @ W0.T`` through the layer's own forward, in its own precision."""
        output: Tensor = self.layer(rows)
        bias = self.bias
        return output if bias is None else output - bias

    def compute_dtype(self) -> torch.dtype:
        """The floating dtype in which the layer computes."""
        declared = getattr(self.layer, "compute_dtype", None)
        if isinstance(declared, torch.dtype):
            return declared
        tensors = [t for t in (held(self.layer, "bias"), *self.layer.parameters()) if isinstance(t, Tensor)]
        dtypes = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        return dtypes[0] if dtypes and dtypes[0].itemsize > 1 else torch.float32

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """``||W0||^2`` per row, ``[d_out]``."""
        with self.whole_weight() as weight:
            assert weight is not None
            return functional.base_squared_norm(weight)


class _LinearView(BaseView):
    """nn.Linear and compatible layers: weight ``[d_out, d_in]``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, *whole_shape(held(layer, "weight")))

    @property
    def is_plain(self) -> bool:
        layer = self.layer
        own = type(layer).forward is nn.Linear.forward and "forward" not in vars(layer)
        return own and not is_observed(layer)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)


class _TransposedLinearView(_LinearView):
    """A linear layer that keeps its weight as ``[d_in, d_out]``, such as GPT-2's Conv1D."""

    kind = "conv1d"

    def __init__(self, layer: nn.Module) -> None:
        d_in, d_out = whole_shape(held(layer, "weight"))
        BaseView.__init__(self, layer, d_out, d_in)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.T


class _OpaqueLinearView(BaseView):
    """A linear layer whose weight is packed (quantized): only its forward is used, never its storage."""

    kind = "opaque"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, cast(int, layer.out_features), cast(int, layer.in_features))

    def weight(self) -> None:
        return None

    @contextmanager
    def whole_weight(self) -> Iterator[None]:
        yield None

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        dtype = self.compute_dtype()
        total = torch.zeros(self.d_out, dtype=torch.float32, device=self.device)
        for start in range(0, self.d_in, 256):
            stop = min(start + 256, self.d_in)
            rows = torch.zeros(stop - start, self.d_in, dtype=dtype, device=self.device)
            rows[torch.arange(stop - start), torch.arange(start, stop)] = 1
            total += self._apply_base(rows).float().square().sum(0)
        return total


class _LookedUpView(BaseView):
    """A view of a layer that cannot be called with A's rows."""

    def _product_of_call(self, A: Tensor) -> Tensor:
        if A.requires_grad and torch.is_grad_enabled():
            raise TargetError(
                f"DoRAN cannot train a {type(self.layer).__name__} whose weight is whole only inside its own forward "
                "(ZeRO-3, an FSDP unit of its own, offload): leave it out of target_modules"
            )
        with torch.no_grad(), self.whole_weight() as weight:
            assert weight is not None
            return functional.base_product(weight, A)


class _EmbeddingView(_LookedUpView):
    """nn.Embedding as the matrix that maps one-hot tokens to vectors: ``[dim, num_embeddings]``, as PEFT's DoRA.

    ``embed_scale`` is a number by which the layer multiplies its output (Gemma, BART).
    """

    kind = "embedding"

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__(layer, layer.embedding_dim, layer.num_embeddings)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        delta = F.linear(F.embedding(x, A.T), B)
        scale = getattr(self.layer, "embed_scale", None)
        return delta if scale is None else delta * scale


class _ConvView(_LookedUpView):
    """nn.Conv1d, 2d or 3d as the matrix ``[out_channels, in_channels / groups * kernel]``: the weight as it is stored.

    With several groups, A is applied to the channels of each group, and B's rows belong to the group of their output
    channel.
    """

    def __init__(self, layer: Convolution) -> None:
        shape = whole_shape(held(layer, "weight"))
        super().__init__(layer, layer.out_channels, shape[1:].numel())
        dims = len(shape) - 2
        self.kind = "conv2d" if dims == 2 else "conv"
        self.channel_dim = -1 - dims
        self._pointwise = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(whole_shape(held(self.layer, "weight")))

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        conv = cast(Convolution, self.layer)
        shape = conv.weight.shape[1:]
        kernels = A.reshape(A.shape[0], *shape).repeat(conv.groups, *(1 for _ in shape))
        hidden = convolve(conv, x, kernels)
        return self._pointwise(hidden, B.reshape(*B.shape, *(1 for _ in shape[1:])), groups=conv.groups)


def base_view(layer: nn.Module, name: str = "layer") -> BaseView:
    """The view that fits a base layer.

    Args:
        layer: nn.Linear, a Conv1D with transposed weight, nn.Embedding, nn.Conv1d, 2d or 3d, or any linear layer
            with ``in_features`` and ``out_features``, such as a quantized one.
        name: the layer's name, for error messages.

    Raises:
        TargetError: if the layer is none of these.
    """
    check_supported(layer, name)
    if isinstance(layer, Convolution):
        return _ConvView(layer)
    if isinstance(layer, nn.Embedding):
        return _EmbeddingView(layer)
    if not has_matrix(layer):
        return _OpaqueLinearView(layer)
    return _TransposedLinearView(layer) if is_transposed(layer) else _LinearView(layer)
