"""The weight side of many layers as one step: from all their parameters to A, B' and c of each, and back.

A layer's forward and backward (prepared.py) then launch what those of a plain low-rank adapter launch. What they learn
of the gradients they leave with their :class:`~doran_core.kernels.sides.Side`. Autograd knows of it by a *ticket*, one
element that all layers of a family take as an input and that none has a gradient for: the weight side's backward is
called when all of theirs were. See layer.py for the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from doran_core.errors import BackendError
from doran_core.kernels.family import Family, Row
from doran_core.kernels.layer import SECOND_DERIVATIVE, without_autocast
from doran_core.kernels.narrow_family import NarrowFamily
from doran_core.kernels.networks import fit_kernels
from doran_core.kernels.sides import Sides
from doran_core.kernels.wide_family import WideFamily

__all__ = ["make_family", "make_sides"]


def make_family(rows: Sequence[Row]) -> Family:
    """The layers' family, computed in the way that their sizes allow."""
    networks = rows[0].networks
    (rank, width), hidden = networks.embedding_A.shape, networks.w1_A.shape[0]
    return (NarrowFamily if fit_kernels(rank, hidden, width) else WideFamily)(rows)


def make_sides(family: Family, *, lean: bool) -> tuple[Sides, Tensor, list[bool]]:
    """The layers' parts, the ticket, and a flag that the first backward pass sets.

    Call this where no function transform is active.
    """
    found: list[Sides] = []
    spent = [False]
    # Past what Function.apply does for function transforms with each of the many parameters.
    apply = super(torch.autograd.Function, WeightSide).apply
    with without_autocast(family.rows[0].weight):
        ticket = apply(family, found, spent, lean, *family.parameters)  # type: ignore[no-untyped-call]
    return found[0], ticket, spent


class WeightSide(torch.autograd.Function):
    """:class:`Family` for autograd: ``apply(family, found, spent, lean, *family.parameters)`` gives the ticket.

    ``found`` gets the layers' parts, and ``spent[0]`` is set by the first backward pass. What the backward needs is
    kept past it, for several backward passes may go through one forward of the weight side; or it is made again by
    each, if ``lean``.
    """

    @staticmethod
    def forward(
        ctx: Any, family: Family, found: list[Sides], spent: list[bool], lean: bool, *parameters: Tensor
    ) -> Tensor:
        sides, kept = family.forward(lean=lean)
        found.append(sides)
        ctx.family, ctx.sides, ctx.kept, ctx.spent = family, sides, kept, spent
        ctx.parameters = parameters
        ctx.versions = [parameter._version for parameter in parameters]
        ctx.set_materialize_grads(False)
        return torch.empty(1, device=family.device)

    @staticmethod
    def backward(ctx: Any, nothing: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackendError(SECOND_DERIVATIVE)
        family: Family = ctx.family
        taken = ctx.sides.take(torch._C._current_graph_task_id())
        used = [bool(sent) for sent in taken]
        now = zip(ctx.parameters, ctx.versions, family.depends_on(used), strict=True)
        if any(needed and parameter._version != version for parameter, version, needed in now):
            raise RuntimeError(
                "a parameter of an adapter was changed in place between a forward pass and its backward pass"
            )
        ctx.spent[0] = True
        if not any(used):
            return (None,) * (4 + len(ctx.parameters))
        with without_autocast(family.rows[0].weight):
            return None, None, None, None, *family.up_to_date().backward(ctx.kept, taken)
