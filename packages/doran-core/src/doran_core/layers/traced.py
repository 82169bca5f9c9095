"""An adapted layer as torch.compile and torch.export see it: plain PyTorch operations, for Inductor to fuse.

    v = W0 x + bias + g B (A x)        y = c v + (1 - c) bias

The products with x are those of a plain low-rank adapter. Inductor fuses the scaling by c into the operations that
follow the layer. The backward needs v, which does not contain c, so a c near 0 is no special case. The weight side (A,
g B and c, see traced_norm.py) is computed for all layers of a block together if :func:`share_blocks` has put a hook on
the block, else layer by layer. Nothing branches on values: a changed W0 is not noticed, and rows in which W0 and g B A
nearly cancel keep the factored norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doran_core import functional
from doran_core.layers.traced_norm import accumulated_product, cast, row_norms
from doran_core.method.factors import GeneratedFactors
from doran_core.support.sharding import read
from doran_core.support.torch_internals import remove_hooks

if TYPE_CHECKING:
    from doran_core.layers.adapter import DoranAdapter  # which imports this module
    from doran_core.layers.base import BaseView

__all__ = ["WeightSide", "forward", "share_blocks"]


class WeightSide(NamedTuple):
    """The weight side of a layer: the tensors that depend on its weights and parameters, and not on x.

    Attributes:
        A: ``[r, d_in]`` in W0's dtype.
        B: ``g B``, ``[d_out, r]``, likewise.
        scale: ``c``, ``[d_out]`` in float32 or wider.
    """

    A: Tensor
    B: Tensor
    scale: Tensor


def forward(adapter: DoranAdapter, view: BaseView, x: Tensor, base_output: Tensor | None = None) -> Tensor:
    """:meth:`DoranAdapter.forward`, traced.

    Args:
        adapter: of the layer.
        view: of its base layer.
        x: the base layer's input.
        base_output: the base layer's output for x, bias included. With None this function calls the base layer.

    Returns:
        Shape and dtype of the base layer's output.
    """
    if base_output is None:
        base_output = view.layer(x)
    dtype, bias = base_output.dtype, view.bias
    A, B, scale = adapter.traced_side or _alone(adapter, view, dtype)
    if x.is_floating_point():
        x = F.dropout(x.to(dtype), adapter.config.dropout, adapter.training)
    unscaled = base_output + view.low_rank(x, A.to(dtype), B.to(dtype))
    if bias is not None and bias.requires_grad:
        nothing = torch.zeros((), dtype=dtype, device=unscaled.device)
        return functional.adapted_output(unscaled, nothing, scale, bias, channel_dim=view.channel_dim)
    output: Tensor = _ScaledOutput.apply(unscaled, scale, bias, view.channel_dim)  # type: ignore[no-untyped-call]
    return output


def _alone(adapter: DoranAdapter, view: BaseView, dtype: torch.dtype) -> WeightSide:
    """The weight side of one layer, whatever its kind and options."""
    if _has_plain_norm(adapter, view):
        return _together([(adapter, view)])[0]
    with torch.autocast(view.device.type, enabled=False):
        A, B = adapter.factor_pair()
        scale = adapter.output_scale(adapter.norm(view, A, B))
        return WeightSide(A.to(dtype), (adapter.scaling * B).to(dtype), scale)


def _has_plain_norm(adapter: DoranAdapter, view: BaseView) -> bool:
    """Whether W0 is frozen and accessible, and the options allow the factored norm."""
    weight = view.weight()
    return weight is not None and not weight.requires_grad and adapter.config.norm_method != "direct"


def _together(layers: list[tuple[DoranAdapter, BaseView]]) -> list[WeightSide]:
    """The weight sides of layers of one rank, scaling, dtype and device, with :func:`_has_plain_norm`."""
    adapters = [adapter for adapter, _ in layers]
    weights = [_weight(view) for _, view in layers]
    first, dtype = adapters[0], weights[0].dtype
    rows, columns = [weight.shape[0] for weight in weights], [weight.shape[1] for weight in weights]
    with torch.autocast(weights[0].device.type, enabled=False):
        A, B = _factors(adapters)
        B = first.scaling * B
        squared_norm = _joined([adapter.squared_norm_of_base(view) for adapter, view in layers])
        learns = (A.detach(), B.detach()) if first.config.norm_grad == "detached" else (A, B)
        norm = row_norms(*learns, squared_norm, weights)
        magnitude = _joined([read(adapter.magnitude) for adapter in adapters])
        scale = functional.output_scale(magnitude, norm, _joined([_tau_of_rows(adapter, norm) for adapter in adapters]))
        low_A, low_B = torch.split(A.to(dtype), columns), torch.split(B.to(dtype), rows)
    return [WeightSide(a.T, b, c) for a, b, c in zip(low_A, low_B, torch.split(scale, rows), strict=True)]


def _weight(view: BaseView) -> Tensor:
    weight = view.weight()
    assert weight is not None
    return weight


def _tau_of_rows(adapter: DoranAdapter, like: Tensor) -> Tensor:
    """``[d_out]``."""
    tau, rows = adapter.tau(), adapter.spec.d_out
    return like.new_full((rows,), tau) if isinstance(tau, float) else tau.expand(rows)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _factors(adapters: list[DoranAdapter]) -> tuple[Tensor, Tensor]:
    """The layers' ``A^T [d_in, r]``, concatenated, and their B ``[d_out, r]``; layers of one trunk share a product."""
    if all(adapter.experts is None and _has_own_networks(adapter.factors) for adapter in adapters):
        return GeneratedFactors.joined([adapter.factors for adapter in adapters])  # type: ignore[misc]
    pairs = [adapter.factor_pair() for adapter in adapters]
    return _joined([A.T for A, _ in pairs]), _joined([B for _, B in pairs])


def _has_own_networks(factors: nn.Module) -> bool:
    return type(factors) is GeneratedFactors and not factors.share_output


def share_blocks(model: nn.Module) -> None:
    """Let torch.compile compute the weight sides of each block's layers together.

    Puts hooks on the modules that are blocks (``LayerSpec.block``), and removes them from modules that no longer are.
    Call this after every change of the adapters. Outside of tracing the hooks do nothing. In a compiled graph, a layer
    that is not called gets gradients of 0 instead of None.

    Args:
        model: its layers are the modules with a method ``adapter_in_use``, which returns the adapter of the next call
            and the view of its base layer, or None.
    """
    blocks: dict[str, list[nn.Module]] = {}
    for layer in model.modules():
        pair = layer.adapter_in_use() if hasattr(layer, "adapter_in_use") else None  # type: ignore[operator]
        if pair is not None:
            blocks.setdefault(pair[0].spec.block, []).append(layer)
    for name, module in model.named_modules():
        remove_hooks(module, (_before, _after).__contains__)
        vars(module).pop(_LAYERS, None)
        if name and name in blocks:
            # Set past nn.Module, which would register the layers again. A search by names would bind the graph to the
            # names; with a list, blocks that are compiled one by one share a graph.
            vars(module)[_LAYERS] = blocks[name]
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_after)


_LAYERS = "_doran_layers"


def _before(block: nn.Module, args: object) -> None:
    if not torch.compiler.is_compiling():
        return
    groups: dict[tuple[Any, ...], list[tuple[DoranAdapter, BaseView]]] = {}
    for layer in getattr(block, _LAYERS):
        pair = layer.adapter_in_use()
        if pair is not None and _has_plain_norm(*pair):
            groups.setdefault(_group(*pair), []).append(pair)
    for layers in groups.values():
        for (adapter, _), side in zip(layers, _together(layers), strict=True):
            adapter.traced_side = side


def _after(block: nn.Module, args: object, output: object) -> None:
    if torch.compiler.is_compiling():
        for layer in getattr(block, _LAYERS):
            pair = layer.adapter_in_use()
            if pair is not None:
                pair[0].traced_side = None


def _group(adapter: DoranAdapter, view: BaseView) -> tuple[Any, ...]:
    """Layers with equal keys can go to :func:`_together`."""
    weight, config = _weight(view), adapter.config
    return adapter.spec.rank, adapter.scaling, weight.dtype, weight.device, config.norm_grad, config.norm_method


class _ScaledOutput(torch.autograd.Function):
    """``c v + (1 - c) bias`` in the dtype of v, for a frozen bias; the arithmetic is float32 or wider."""

    @staticmethod
    def forward(ctx: Any, unscaled: Tensor, scale: Tensor, bias: Tensor | None, channel_dim: int) -> Tensor:
        ctx.save_for_backward(unscaled, scale, bias)
        ctx.channel_dim = channel_dim
        scale, bias = _along(channel_dim, unscaled, scale), _along(channel_dim, unscaled, bias)
        y = unscaled * scale if bias is None else unscaled * scale + (1.0 - scale) * bias
        return cast(y, unscaled.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unscaled, scale, bias = ctx.saved_tensors
        (grad,), channel = grads, ctx.channel_dim
        bias = _along(channel, unscaled, bias)
        wide = cast(grad, scale.dtype)
        products = wide * (unscaled if bias is None else unscaled - bias.to(scale.dtype))
        grad_unscaled = cast(wide * _along(channel, unscaled, scale), grad.dtype)
        return grad_unscaled, _sums(products, grad.dtype, channel), None, None


def _along(channel_dim: int, like: Tensor, rows: Tensor | None) -> Any:
    """``[d_out]`` reshaped to broadcast with ``like``, whose dimension ``channel_dim`` is d_out."""
    if rows is None:
        return None
    shape = [1] * like.dim()
    shape[channel_dim] = -1
    return rows.view(shape)


def _sums(products: Tensor, dtype: torch.dtype, channel_dim: int) -> Tensor:
    """Sums over all dimensions but one, ``[d_out]``.

    The sum is a product with ones: Inductor would fuse a plain sum over tokens with the operation that produces the
    gradient, and reach half of the bandwidth. bfloat16 has the range of float32, and the error of its rounding averages
    out.
    """
    if channel_dim == -1 and dtype == torch.bfloat16 and products.is_cuda:
        rows = products.to(dtype).reshape(-1, products.shape[-1])
        return accumulated_product(rows.new_ones(1, rows.shape[0]), rows).view(-1)
    others = [dim for dim in range(products.dim()) if dim != channel_dim % products.dim()]
    return products.sum(others) if others else products
