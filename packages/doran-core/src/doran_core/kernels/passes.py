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

__all__ = ["Assembled", "Finished", "Passes", "Source", "TorchPasses", "added", "narrow_on_cuda", "small_scale"]


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
        magnitude: ``[d_out]`` acc.
        tau: ``[d_out]`` acc, one value a row whatever tau's granularity; of its raw value if that was given.
    """

    B: Tensor
    product: Tensor | None
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

    def generate(self, parameters: Networks, slope: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(A [r, d_in], B [d_out, r])`` of the networks, A in ``dtype``."""
        ...

    def generate_gradients(self, parameters: Networks, slope: float, grad_A: Tensor, grad_B: Tensor) -> Networks:
        """The gradients of the parameters from those of A, in parts ``[k, r, d_in]``, and of B ``[d_out, r]``."""
        ...

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right``, accumulated and returned in acc."""
        ...

    def assemble(
        self,
        weight: Tensor | None,
        product: Tensor | None,
        A: Tensor,
        B: Tensor,
        squared_norm: Tensor,
        magnitude: Tensor,
        tau: Tensor,
        scaling: float,
        dtype: torch.dtype,
        *,
        repair: bool,
    ) -> Assembled:
        """Norm, scale and scaled factor.

        Args:
            weight: W0, or None if the layer hides it.
            product: ``U = W0 A^T``, ``[d_out, r]`` acc, where W0 is hidden; may be overwritten.
            A: ``[r, d_in]``, as the layer uses it.
            B: ``[d_out, r]``.
            squared_norm: ``||W0||^2``, ``[d_out]``.
            magnitude: ``[d_out]``.
            tau: ``[1]`` or ``[d_out]``.
            scaling: ``g``.
            dtype: of ``scaled_B``.
            repair: take the norm directly for rows in which V cancels.
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
        """``y = c z + (1 - c) bias + h B'^T`` for ``z [..., d_out]`` of T tokens and ``h = x A^T [T, r]``."""
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
        raw_tau: Tensor | None,
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
            raw_tau: what tau is the softplus of, ``[1]`` or one a group of rows; None for tau's own gradient.
            detach_norm: the norm is a constant.
        """
        ...

    def gradient_of_A(
        self,
        grad_hidden: Tensor,
        x: Tensor,
        product_grad: Tensor | None,
        weight: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> Tensor:
        """``grad_hidden^T x + M^T (W0 + g B A)``, in parts that are still to be added, ``[k, r, d_in]`` acc.

        Args:
            grad_hidden: ``G B'``, ``[T, r]``.
            x: the branch's input, ``[T, d_in]``.
            product_grad: ``M``, ``[d_out, r]``; None for a detached norm.
            weight: W0; None if it is hidden, and then its term is left out.
            A: ``[r, d_in]``, as the layer uses it.
            B: ``[d_out, r]``.
            scaling: ``g``.
        """
        ...


def small_scale(dtype: torch.dtype, *, has_bias: bool) -> float:
    """``|c|`` below which the layer's output no longer stands in for the output before scaling.

    ``(y - bias) / c`` has an error of ``eps |bias| / |c|``; without a bias only underflow counts, and c = 0.
    """
    return 0.5 if has_bias or dtype == torch.float16 else 1e-3


def added(parts: Tensor) -> Tensor:
    """The sum over the first dimension, without an operation if there is one part."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def narrow_on_cuda(tensor: Tensor) -> bool:
    """Whether the GPU's matrix units accumulate it in float32 by themselves."""
    return tensor.is_cuda and tensor.dtype.itemsize < 4


class TorchPasses:
    """On any device."""

    def generate(self, parameters: Networks, slope: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = networks.values(parameters, slope)
        return A.to(dtype), B

    def generate_gradients(self, parameters: Networks, slope: float, grad_A: Tensor, grad_B: Tensor) -> Networks:
        return networks.gradients(parameters, slope, added(grad_A), grad_B)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        if narrow_on_cuda(left):
            return torch.mm(left, right, out_dtype=torch.float32)
        return functional.wide_product(left, right)

    def assemble(
        self,
        weight: Tensor | None,
        product: Tensor | None,
        A: Tensor,
        B: Tensor,
        squared_norm: Tensor,
        magnitude: Tensor,
        tau: Tensor,
        scaling: float,
        dtype: torch.dtype,
        *,
        repair: bool,
    ) -> Assembled:
        if product is None:
            assert weight is not None
            product = self.product(weight, A.T)
        A = A.to(product.dtype)
        aligned = functional.aligned_product(product, A, B, scaling)
        norm = functional.aligned_row_norm(squared_norm, product, aligned, B, scaling)
        if repair and weight is not None:
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
        total = work.sum(0)
        if bias is not None:
            total -= bias * wide.sum(0)
        return torch.mul(wide, scale, out=work).to(grad.dtype), total[None]

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
        raw_tau: Tensor | None,
        *,
        detach_norm: bool,
    ) -> Finished:
        aligned, norm, scale, _ = assembled
        total = added(sums)
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
        grad_norm = grad_tau = (grad_magnitude * scale).neg_()
        if raw_tau is not None:
            grad_tau = grad_norm * functional.per_row(raw_tau.sigmoid(), B.shape[0])
        grad_B = (scale * scaling)[:, None] * factor_grad
        if detach_norm:
            return Finished(grad_B, None, grad_magnitude, grad_tau)
        through_norm = (grad_norm * scaling).div_(norm).masked_fill_(norm <= 0, 0.0)[:, None]
        grad_product = (through_norm * B).to(product_dtype)
        return Finished(grad_B.addcmul_(through_norm, aligned), grad_product, grad_magnitude, grad_tau)

    def gradient_of_A(
        self,
        grad_hidden: Tensor,
        x: Tensor,
        product_grad: Tensor | None,
        weight: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> Tensor:
        total = self.product(grad_hidden.T, x)
        if product_grad is not None:
            if weight is not None:
                total = self._add_transposed_product(total, product_grad, weight)
            mixed = (B.to(product_grad.dtype).T @ product_grad).mul_(scaling)  # symmetric
            total = self._add_transposed_product(total, mixed.to(A.dtype), A)
        return total[None]

    def _add_transposed_product(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """``total + left^T @ right`` in acc, perhaps in place; ``right`` may be as large as W0."""
        if narrow_on_cuda(right):
            return torch.addmm(total, left.T, right, out_dtype=torch.float32)
        if right.dtype == total.dtype:
            return total.addmm_(left.T, right)
        return total.add_(functional.wide_transposed_product(left, right))
