"""The passes of an adapted layer that are more than a matrix product, and how PyTorch computes them.

An implementation is a class with these methods; triton_passes.py has the other. Shapes: T tokens, d_out rows of W0,
d_in columns, r the rank; "acc" is float32, or float64 for a float64 base. See layer.py for the whole.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from doran_core import functional
from doran_core.kernels import networks
from doran_core.kernels.networks import Networks

__all__ = ["Assembled", "Finished", "Passes", "Source", "TorchPasses", "small_scale"]


class Assembled(NamedTuple):
    """What the factors make of a layer.

    Attributes:
        aligned: ``K = V A^T``, ``[d_out, r]`` acc: the norm's gradient needs it.
        norm: ``n``, ``[d_out]`` acc.
        scale: ``c``, ``[d_out]`` acc.
        scaled_B: ``B' = c g B``, ``[d_out, r]`` in the layer's dtype.
    """

    aligned: Tensor
    norm: Tensor
    scale: Tensor
    scaled_B: Tensor


class Finished(NamedTuple):
    """Gradients per row of W0.

    Attributes:
        B: ``[d_out, r]`` acc.
        product: ``M = dL/dU``, ``[d_out, r]`` in the dtype of W0; None for a detached norm.
        gram: ``N = M / c``, ``[d_out, r]`` in the layer's dtype, without a division: ``N^T B' = g M^T B``, which is
            ``2 dL/d(A A^T)``; None for a detached norm, or where ``M`` and B have one dtype and give that themselves.
        magnitude: ``[d_out]`` acc.
        tau: ``[d_out]`` acc, one value a row whatever tau's granularity.
    """

    B: Tensor
    product: Tensor | None
    gram: Tensor | None
    magnitude: Tensor
    tau: Tensor


class Source(NamedTuple):
    """What ``sum over tokens of grad * (W0 x)`` is made of, and when to make it.

    Attributes:
        grad: ``[T, d_out]``.
        x: ``[T, d_in]``.
        weight: W0, ``[d_out, d_in]``.
        threshold: the ``|c|`` below which the layer's output does not tell the base layer's.
    """

    grad: Tensor
    x: Tensor
    weight: Tensor
    threshold: float

    def sums(self, rows: Tensor) -> Tensor:
        """The sums of these rows of W0."""
        product = functional.wide_product(self.x, self.weight[rows].T)
        return (self.grad[:, rows].to(product.dtype) * product).sum(0)


class Passes(Protocol):
    """The factor networks, the four passes, and the products that keep their sums in acc."""

    def generate(self, parameters: Networks, slope: float) -> tuple[Tensor, Tensor]:
        """``(A [r, d_in], B [d_out, r])`` of the networks."""
        ...

    def generate_gradients(self, parameters: Networks, slope: float, grad_A: Tensor, grad_B: Tensor) -> Networks:
        """The gradients of the networks' parameters."""
        ...

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right``, accumulated and returned in acc."""
        ...

    def add_transposed_product(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """``total + left^T @ right`` in acc, perhaps in place; ``right`` may be as large as W0."""
        ...

    def assemble(
        self,
        product: Tensor,
        A: Tensor,
        B: Tensor,
        squared_norm: Tensor,
        magnitude: Tensor,
        tau: Tensor,
        scaling: float,
        weight: Tensor | None,
        dtype: torch.dtype,
    ) -> Assembled:
        """Norm, scale and scaled factor.

        Args:
            product: ``U = W0 A^T``, ``[d_out, r]`` acc; may be overwritten.
            A: ``[r, d_in]``, as the layer uses it.
            B: ``[d_out, r]``.
            squared_norm: ``||W0||^2``, ``[d_out]``.
            magnitude: ``[d_out]``.
            tau: ``[1]`` or ``[d_out]``.
            scaling: ``g``.
            weight: W0, to take the norm directly for rows in which V cancels; None to leave them.
            dtype: of ``scaled_B``.
        """
        ...

    def expand(
        self,
        base_output: Tensor,
        hidden: Tensor,
        scaled_B: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        inplace: bool,
    ) -> Tensor:
        """``y = c z + (1 - c) bias + h B'^T`` for ``z [T, d_out]`` and ``h = x A^T [T, r]``."""
        ...

    def scale_gradient(self, grad: Tensor, kept: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(c * grad, sum over tokens of grad * (kept - bias))``, ``[T, d_out]`` and ``[k, d_out]`` acc.

        The sums may come in k parts, which are still to be added.
        """
        ...

    def finish(
        self,
        sums: Tensor,
        factor_grad: Tensor,
        assembled: Assembled,
        B: Tensor,
        magnitude: Tensor,
        tau: Tensor,
        scaling: float,
        product_dtype: torch.dtype,
        source: Source | None,
        *,
        detach_norm: bool,
    ) -> Finished:
        """The gradients of a row's parameters, through the scale and the norm.

        Args:
            sums: of :meth:`scale_gradient`, with ``kept`` the layer's output where there is a source, else
                the base layer's.
            factor_grad: ``P = grad^T h``, ``[d_out, r]`` acc.
            assembled: of the forward pass.
            B: ``[d_out, r]``.
            magnitude: ``[d_out]``.
            tau: ``[1]`` or ``[d_out]``.
            scaling: ``g``.
            product_dtype: of ``Finished.product``.
            source: what the sums are to be taken from anew for the rows whose ``c`` is near 0.
            detach_norm: the norm is a constant.
        """
        ...


def small_scale(dtype: torch.dtype, bias: Tensor | None) -> float:
    """``|c|`` below which the layer's output no longer stands in for the output before scaling.

    ``(y - bias) / c`` has an error of ``eps |bias| / |c|``; without a bias only underflow counts, and c = 0.
    """
    return 0.5 if bias is not None or dtype == torch.float16 else 1e-3


def _narrow_on_cuda(tensor: Tensor) -> bool:
    """Whether the GPU's matrix units accumulate it in float32 by themselves."""
    return tensor.is_cuda and tensor.dtype.itemsize < 4


class TorchPasses:
    """On any device."""

    def generate(self, parameters: Networks, slope: float) -> tuple[Tensor, Tensor]:
        return networks.values(parameters, slope)

    def generate_gradients(self, parameters: Networks, slope: float, grad_A: Tensor, grad_B: Tensor) -> Networks:
        return networks.gradients(parameters, slope, grad_A, grad_B)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        if _narrow_on_cuda(left):
            return torch.mm(left, right, out_dtype=torch.float32)
        if left.dtype == right.dtype and left.dtype.itemsize >= 4:
            return left @ right
        return functional.wide_product(left, right)

    def add_transposed_product(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if _narrow_on_cuda(right):
            return torch.addmm(total, left.T, right, out_dtype=torch.float32)
        if right.dtype == total.dtype:
            return total.addmm_(left.T, right)
        return total.add_(functional.wide_transposed_product(left, right))

    def assemble(
        self,
        product: Tensor,
        A: Tensor,
        B: Tensor,
        squared_norm: Tensor,
        magnitude: Tensor,
        tau: Tensor,
        scaling: float,
        weight: Tensor | None,
        dtype: torch.dtype,
    ) -> Assembled:
        A = A.to(product.dtype)
        aligned = functional.aligned_product(product, A, B, scaling)
        norm = functional.aligned_row_norm(squared_norm, product, aligned, B, scaling)
        if weight is not None:
            rows = functional.cancelled_rows(norm, squared_norm)
            if rows.numel():
                V = functional.direction(weight[rows], A, B[rows], scaling)
                norm[rows] = functional.row_norm(weight[rows], A, B[rows], scaling)
                aligned[rows] = V @ A.T
        scale = functional.output_scale(magnitude, norm, tau)
        return Assembled(aligned, norm, scale, functional.scaled_factor(B, scale, scaling).to(dtype))

    def expand(
        self,
        base_output: Tensor,
        hidden: Tensor,
        scaled_B: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        inplace: bool,
    ) -> Tensor:
        if base_output.dtype != scale.dtype:
            y = functional.adapted_output(base_output, hidden @ scaled_B.T, scale, bias)
            return base_output.copy_(y) if inplace else y
        y = base_output.mul_(scale) if inplace else base_output * scale
        if bias is not None:
            y.add_((1.0 - scale) * bias)
        return y.addmm_(hidden, scaled_B.T)

    def scale_gradient(self, grad: Tensor, kept: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = grad.to(scale.dtype)
        work = wide * kept
        sums = work.sum(0)
        if bias is not None:
            sums -= bias * wide.sum(0)
        scaled = torch.mul(wide, scale, out=work)
        return scaled.to(grad.dtype), sums[None]

    def finish(
        self,
        sums: Tensor,
        factor_grad: Tensor,
        assembled: Assembled,
        B: Tensor,
        magnitude: Tensor,
        tau: Tensor,
        scaling: float,
        product_dtype: torch.dtype,
        source: Source | None,
        *,
        detach_norm: bool,
    ) -> Finished:
        aligned, norm, scale, scaled_B = assembled
        total = sums.sum(0) if sums.shape[0] > 1 else sums[0]
        if source is None:
            grad_scale = total + scaling * (factor_grad * B).sum(1)
        else:
            grad_scale = total / scale
            small = scale.abs() < source.threshold
            if bool(small.any()):
                rows = small.nonzero()[:, 0]
                grad_scale[rows] = source.sums(rows) + scaling * (factor_grad[rows] * B[rows]).sum(1)
        denominator = norm + tau
        grad_magnitude = grad_scale.div_(denominator).masked_fill_(denominator <= 0, 0.0)
        grad_tau = (grad_magnitude * scale).neg_()
        grad_B = (scale * scaling)[:, None] * factor_grad
        if detach_norm:
            return Finished(grad_B, None, None, grad_magnitude, grad_tau)
        through_norm = (grad_tau * scaling).div_(norm).masked_fill_(norm <= 0, 0.0)[:, None]
        grad_B.addcmul_(through_norm, aligned)
        grad_product = through_norm * B
        if product_dtype == B.dtype:
            return Finished(grad_B, grad_product, None, grad_magnitude, grad_tau)
        per_norm = (grad_magnitude * -scaling).div_(norm).masked_fill_(norm <= 0, 0.0)
        grad_gram = (per_norm[:, None] * B).to(scaled_B.dtype)
        return Finished(grad_B, grad_product.to(product_dtype), grad_gram, grad_magnitude, grad_tau)
