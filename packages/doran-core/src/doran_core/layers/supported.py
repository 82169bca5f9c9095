"""Decides which layers DoRAN can adapt, by their class and by a trial call; refuses all others. Imports no view."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from doran_core.errors import TargetError
from doran_core.support.sharding import held, whole_shape
from doran_core.support.torch_internals import own_parameters

__all__ = ["Convolution", "check_supported", "has_matrix", "is_adaptable", "is_linear", "is_transposed"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CHECKED: set[type[nn.Module]] = set()
"""Classes with a forward of their own that has been tried and found to be the plain one."""


def has_matrix(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as a matrix of floating numbers; False for a packed (quantized) weight."""
    weight = held(layer, "weight")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return False
    shape = whole_shape(weight)
    declared = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
    if type(weight) not in (Tensor, nn.Parameter) and None not in declared and shape != declared:
        return False  # bitsandbytes packs 4 bits into floating numbers, too (quant_storage)
    return len(shape) == 2 and weight.dtype.itemsize > 1


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as ``[d_in, d_out]``, as GPT-2's Conv1D does."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_linear(layer: nn.Module) -> bool:
    """Whether ``target_modules="all-linear"`` means this layer: dense, transposed or quantized linear."""
    if isinstance(layer, nn.LazyLinear | nn.Embedding | Convolution | NonDynamicallyQuantizableLinear):
        return False
    if isinstance(layer, nn.Linear) or (is_transposed(layer) and has_matrix(layer)):
        return True
    return (
        isinstance(getattr(layer, "in_features", None), int)
        and isinstance(getattr(layer, "out_features", None), int)
        and not isinstance(layer, nn.Bilinear)
        and not list(layer.children())
    )


def is_adaptable(layer: nn.Module) -> bool:
    """Whether DoRAN can adapt this layer."""
    return isinstance(layer, Convolution | nn.Embedding) or is_linear(layer)


def check_supported(layer: nn.Module, name: str) -> None:
    """Refuse a layer that DoRAN cannot adapt.

    Args:
        layer: the base layer.
        name: its name, for error messages.

    Raises:
        TargetError: the layer is of no supported kind, computes something else than that kind does, or computes its
            weight from other tensors.
    """
    _refuse_composed(layer, name)
    if isinstance(layer, Convolution):
        _refuse_own_convolution(layer, name)
    elif isinstance(layer, nn.Embedding):
        _refuse_own_lookup(layer, name)
    elif isinstance(layer, NonDynamicallyQuantizableLinear):
        raise TargetError(
            f"{name}: the output projection of nn.MultiheadAttention is read, not called, so an adapter around it "
            "would do nothing; write the attention with nn.Linear layers to adapt it"
        )
    elif not is_linear(layer):
        raise TargetError(
            f"{name}: DoRAN adapts linear layers, Conv1D, Embedding and convolutions, got {type(layer).__name__}"
        )
    elif has_matrix(layer):
        _refuse_own_forward(layer, name)


def _refuse_composed(layer: nn.Module, name: str) -> None:
    """Refuse layers whose weight is computed from others, or that have layers inside."""
    if parametrize.is_parametrized(layer) or ("weight" in vars(layer) and not _fsdp_put(layer)):
        raise TargetError(
            f"{name}: the weight of this {type(layer).__name__} is computed by a parametrization, such as weight_norm; "
            "remove it first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    inside = [child for child, _ in layer.named_children()]
    if inside and is_linear(layer):
        raise TargetError(f"{name}: this {type(layer).__name__} has modules inside ({inside}); adapt those instead")


def _fsdp_put(layer: nn.Module) -> bool:
    """Whether FSDP put the weight there: FSDP2 beside the parameter, FSDP1 for a pass in place of one."""
    return "weight" in own_parameters(layer) or not list(layer.named_parameters())


def _refuse_own_forward(layer: nn.Module, name: str) -> None:
    """Refuse a layer with a dense weight whose forward is more than ``x W0^T + bias``; found by trying it."""
    weight = cast(Tensor, layer.weight)
    if type(layer).forward is nn.Linear.forward or weight.is_meta or type(layer) in _CHECKED:
        return
    matrix = weight.T if is_transposed(layer) else weight
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        x = torch.randn(2, matrix.shape[1]).to(weight)
        expected = F.linear(x, matrix, cast("Tensor | None", getattr(layer, "bias", None)))
        try:
            actual = layer(x)
        except Exception as error:
            raise TargetError(f"{name}: {type(layer).__name__} could not be called on one tensor: {error}") from error
    if not isinstance(actual, Tensor) or not torch.allclose(actual.float(), expected.float(), rtol=2e-2, atol=2e-2):
        raise TargetError(
            f"{name}: the forward of {type(layer).__name__} is not x W^T + bias, so DoRAN cannot adapt it"
        )
    _CHECKED.add(type(layer))


def _refuse_own_lookup(layer: nn.Embedding, name: str) -> None:
    """Refuse an embedding with options that DoRAN lacks, or whose forward is more than a lookup times ``embed_scale``.

    A forward other than nn.Embedding's is tried.
    """
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        raise TargetError(
            f"{name}: DoRAN adapts nn.Embedding without max_norm, scale_grad_by_freq and sparse, got {layer}"
        )
    known = type(layer).forward is nn.Embedding.forward or type(layer) in _CHECKED
    if known or layer.weight.is_meta or not layer.num_embeddings:
        return
    tokens = torch.tensor([0, layer.num_embeddings - 1], device=layer.weight.device)
    with torch.no_grad():
        expected = F.embedding(tokens, layer.weight) * getattr(layer, "embed_scale", 1.0)
        actual = layer(tokens)
    if not isinstance(actual, Tensor) or not torch.allclose(actual.float(), expected.float(), rtol=2e-2, atol=2e-2):
        raise TargetError(
            f"{name}: the forward of {type(layer).__name__} is neither a lookup nor a lookup times embed_scale, so "
            "DoRAN cannot adapt it"
        )
    _CHECKED.add(type(layer))


def _refuse_own_convolution(layer: Convolution, name: str) -> None:
    plain = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
    if type(layer).forward not in plain:
        raise TargetError(
            f"{name}: DoRAN adapts nn.Conv1d, 2d and 3d, got {type(layer).__name__} with a forward of its own"
        )
    if isinstance(layer.weight, nn.UninitializedParameter):
        raise TargetError(f"{name}: this {type(layer).__name__} has no weight yet; call the model once, then adapt it")
