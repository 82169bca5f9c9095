"""The checks that every adapter passes on reading and before writing: dtypes, finite values, shapes, ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from doran_core.config import DoranConfig
from doran_core.errors import (
    AdapterFormatError,
    MissingKeyError,
    NonFiniteError,
    RankError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedKeyError,
)

__all__ = ["check_compiled_parts", "check_pair", "check_tensors", "check_trainable_module", "check_vector"]

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensors(where: str, tensors: Mapping[str, Tensor], *, integers: bool = False) -> None:
    """Refuse tensors that are not floating point or not finite.

    Args:
        where: file or object, for messages.
        tensors: by key.
        integers: let integer tensors pass (buffers of modules that are saved in full).

    Raises:
        TensorDtypeError, NonFiniteError: naming the key.
    """
    for key, tensor in tensors.items():
        if integers and not tensor.is_floating_point() and not tensor.is_complex():
            continue
        if tensor.dtype not in _FLOATING:
            raise TensorDtypeError(f"{where}: {key}: dtype {tensor.dtype}, expected one of {list(map(str, _FLOATING))}")
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            count = tensor.numel() - int(finite.sum())
            raise NonFiniteError(f"{where}: {key}: {count} of {tensor.numel()} values are NaN or infinite")


def check_vector(where: str, key: str, tensor: Tensor, size: int) -> None:
    """Refuse a tensor that is not of shape ``[size]``."""
    if tuple(tensor.shape) != (size,):
        raise TensorShapeError(f"{where}: {key}: shape {list(tensor.shape)}, expected [{size}]")


def check_pair(where: str, module: str, A: Tensor, B: Tensor, rank: int) -> None:
    """Refuse factors that are not ``A [r, d_in]`` and ``B [d_out, r]`` with r as configured.

    Raises:
        TensorShapeError: not matrices.
        RankError: the ranks disagree.
    """
    for name, tensor in (("A", A), ("B", B)):
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise TensorShapeError(f"{where}: {module}: {name} has shape {list(tensor.shape)}, expected a matrix")
    if not A.shape[0] == B.shape[1] == rank:
        raise RankError(
            f"{where}: {module}: rank {A.shape[0]} of A {list(A.shape)}, {B.shape[1]} of B {list(B.shape)}, "
            f"{rank} in the configuration"
        )


def check_compiled_parts(where: str, module: str, B: Tensor, scale: Tensor, magnitude: Tensor) -> None:
    """Refuse a scale or magnitude that does not fit ``B [d_out, r]``, and a scale that is not float32."""
    check_vector(where, f"{module} (magnitude)", magnitude, B.shape[0])
    check_vector(where, f"{module} (scale)", scale, B.shape[0])
    if scale.dtype != torch.float32:
        raise TensorDtypeError(f"{where}: {module} (scale): dtype {scale.dtype}, expected torch.float32")


def check_trainable_module(where: str, config: DoranConfig, module: str, tensors: Mapping[str, Tensor]) -> None:
    """Check what the configuration alone says about one module's tensors.

    What the modules share (trunks, shared outputs) is checked as a whole when the adapters are rebuilt.

    Raises:
        MissingKeyError, UnexpectedKeyError, TensorShapeError, RankError: naming module and part.
    """
    if "magnitude" not in tensors:
        raise MissingKeyError(f"{where}: {module}: no tensor 'magnitude'")
    magnitude, rank = tensors["magnitude"], config.rank_for(module)
    if magnitude.dim() != 1 or magnitude.numel() == 0:
        raise TensorShapeError(f"{where}: {module}: magnitude has shape {list(magnitude.shape)}, expected [d_out]")
    rows = magnitude.shape[0]
    _check_presence(where, module, tensors, "tau.raw", config.tau_kind != "zero", f"tau_kind={config.tau_kind!r}")
    _check_presence(where, module, tensors, "experts.coefficients", config.experts, f"experts={config.experts}")
    if "tau.raw" in tensors:
        check_vector(where, f"{module}.tau.raw", tensors["tau.raw"], _tau_size(where, config, module, rows))
    if "experts.coefficients" in tensors and tensors["experts.coefficients"].shape != (rank,):
        shape = list(tensors["experts.coefficients"].shape)
        raise RankError(f"{where}: {module}.experts.coefficients: shape {shape}, expected [{rank}], the rank")
    if config.factors == "static":
        _check_static(where, module, tensors, rank, rows)
    elif "factors.w2_A" in tensors or "factors.w2_B" in tensors:
        _check_generated(where, module, tensors, rows)


def _check_presence(
    where: str, module: str, tensors: Mapping[str, Tensor], part: str, wanted: bool, because: str
) -> None:
    if wanted and part not in tensors:
        raise MissingKeyError(f"{where}: {module}: no tensor {part!r}, which {because} needs")
    if not wanted and part in tensors:
        raise UnexpectedKeyError(f"{where}: {module}: tensor {part!r}, which {because} does not have")


def _tau_size(where: str, config: DoranConfig, module: str, rows: int) -> int:
    if config.tau_granularity == "layer":
        return 1
    if config.tau_granularity == "row":
        return rows
    if config.head_dim is None or rows % config.head_dim:
        raise AdapterFormatError(f"{where}: {module}: head_dim {config.head_dim} does not divide {rows} rows")
    return rows // config.head_dim


def _check_static(where: str, module: str, tensors: Mapping[str, Tensor], rank: int, rows: int) -> None:
    for part in ("factors.A", "factors.B"):
        _check_presence(where, module, tensors, part, True, "factors='static'")
    A, B = tensors["factors.A"], tensors["factors.B"]
    check_pair(where, module, A, B, rank)
    if B.shape[0] != rows:
        raise TensorShapeError(f"{where}: {module}.factors.B: {B.shape[0]} rows, magnitude has {rows}")


def _check_generated(where: str, module: str, tensors: Mapping[str, Tensor], rows: int) -> None:
    for part in ("factors.w2_A", "factors.w2_B"):
        _check_presence(where, module, tensors, part, True, "factors='generated'")
        if tensors[part].dim() != 2 or 0 in tensors[part].shape:
            shape = list(tensors[part].shape)
            raise TensorShapeError(f"{where}: {module}.{part}: shape {shape}, expected a matrix")
    if tensors["factors.w2_B"].shape[0] != rows:
        found = tensors["factors.w2_B"].shape[0]
        raise TensorShapeError(f"{where}: {module}.factors.w2_B: {found} rows, magnitude has {rows}")
