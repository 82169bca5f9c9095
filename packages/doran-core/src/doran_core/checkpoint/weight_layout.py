"""How a base layer's stored weight becomes the matrix ``[d_out, d_in]`` of the method, and back.

Kinds: linear ``[d_out, d_in]``; conv1d (GPT-2) ``[d_in, d_out]``; embedding ``[num_embeddings, dim]`` with
``d_out = dim``; conv2d ``[d_out, in, kh, kw]``; conv ``[d_out, in, k]`` or ``[d_out, in, kd, kh, kw]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from doran_core.adapter.schema import Kind
from doran_core.errors import CheckpointError

__all__ = ["decide_kind", "from_matrix", "is_transposed", "matrix_shape", "to_matrix"]


def is_transposed(kind: Kind) -> bool:
    """Whether the stored weight is ``[d_in, d_out]``."""
    return kind in ("conv1d", "embedding")


def matrix_shape(shape: Sequence[int], kind: Kind) -> tuple[int, int]:
    """``(d_out, d_in)`` of a stored weight of this shape."""
    rows, columns = shape[0], math.prod(shape[1:])
    return (columns, rows) if is_transposed(kind) else (rows, columns)


def to_matrix(weight: Tensor, kind: Kind) -> Tensor:
    """The weight as ``[d_out, d_in]``, a view."""
    return weight.T if is_transposed(kind) else weight.flatten(1)


def from_matrix(matrix: Tensor, kind: Kind, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_matrix` for a stored weight of this shape."""
    return matrix.T if is_transposed(kind) else matrix.reshape(tuple(shape))


def decide_kind(
    where: str,
    shape: Sequence[int],
    sizes: tuple[int, int],
    declared: Kind | None,
    *,
    fan_in_fan_out: bool = False,
) -> Kind:
    """The kind of a module, which the adapter may not record.

    Args:
        where: checkpoint and key, for the message.
        shape: of the stored weight.
        sizes: the adapter's ``(d_out, d_in)``.
        declared: the adapter's record, or None.
        fan_in_fan_out: PEFT's flag; settles a square weight.

    Raises:
        CheckpointError: the weight does not have the adapter's sizes either way.
    """
    square = sizes[0] == sizes[1]
    if declared is not None:
        order: list[Kind] = [declared]
    elif len(shape) == 2 and square and fan_in_fan_out:
        order = ["conv1d"]
    elif len(shape) == 2:
        order = ["linear", "conv1d"]
    else:
        order = ["conv2d", "conv"]
    for kind in order:
        dims = {"conv2d": (4,), "conv": (3, 5)}.get(kind, (2,))
        if len(shape) in dims and matrix_shape(shape, kind) == sizes:
            return kind
    raise CheckpointError(
        f"{where}: weight of shape {list(shape)} does not fit the adapter, whose layer has d_out={sizes[0]} and "
        f"d_in={sizes[1]}" + (f" and is a {declared}" if declared else "")
    )
