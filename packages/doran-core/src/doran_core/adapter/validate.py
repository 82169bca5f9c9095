"""Checks of every adapter, on reading and before writing: dtypes, finite values, shapes, ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from doran_core.errors import (
    AdapterFormatError,
    ConfigError,
    MissingKeyError,
    NonFiniteError,
    RankError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedKeyError,
)
from doran_core.method.config import DoranConfig
from doran_core.method.sharing import BLOCK_EMBEDDING, TRUNK, shared_parts, sharing_group
from doran_core.method.tau import tau_size

__all__ = [
    "check_folded_parts",
    "check_pair",
    "check_rows",
    "check_tensors",
    "check_trainable_modules",
    "check_vector",
    "own_generator_parts",
]

_OUTPUTS = ("factors.w2_A", "factors.w2_B")
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
        # torch.isfinite makes a copy; the extremes alone tell whether all values are finite, NaN being both.
        if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
            count = int((~torch.isfinite(tensor)).sum())
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


def check_folded_parts(where: str, module: str, B: Tensor, scale: Tensor, magnitude: Tensor) -> None:
    """Refuse a scale or magnitude that does not fit ``B [d_out, r]``, and a scale that is not float32."""
    check_vector(where, f"{module} (magnitude)", magnitude, B.shape[0])
    check_vector(where, f"{module} (scale)", scale, B.shape[0])
    if scale.dtype != torch.float32:
        raise TensorDtypeError(f"{where}: {module} (scale): dtype {scale.dtype}, expected torch.float32")


def check_rows(where: str, module: str, zero_rows: Sequence[int]) -> None:
    """Refuse rows of zeros: PEFT reads a folded adapter as DoRA, which makes such rows NaN."""
    if zero_rows:
        some = ", ".join(map(str, zero_rows[:8])) + (", ..." if len(zero_rows) > 8 else "")
        raise NonFiniteError(
            f"{where}: {module}: W0 + B A is 0 in {len(zero_rows)} of its rows ({some}), and DoRA's magnitude over "
            "their norm would be NaN in PEFT; keep the trainable form, merge it, or leave this module out"
        )


def check_trainable_modules(where: str, config: DoranConfig, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check the modules' tensors against the configuration.

    Shared tensors, their owners and shapes are checked later, when the adapters are rebuilt.

    Args:
        where: file or object, for messages.
        config: the options.
        modules: tensors by part, by module.

    Raises:
        MissingKeyError, UnexpectedKeyError, TensorShapeError, RankError: naming module and part.
    """
    for name, tensors in modules.items():
        _check_module(where, config, name, tensors)
    if config.factors == "generated" and not own_generator_parts(config, modules):
        for name, tensors in modules.items():
            _check_generated(where, config, name, tensors)
        _check_stored_once(where, config, modules)
        _check_trunks(where, config, modules)


def _check_module(where: str, config: DoranConfig, module: str, tensors: Mapping[str, Tensor]) -> None:
    if "magnitude" not in tensors:
        raise MissingKeyError(f"{where}: {module}: no tensor 'magnitude'")
    magnitude, rank = tensors["magnitude"], config.rank_for(module)
    if magnitude.dim() not in (1, 2) or magnitude.numel() == 0:
        raise TensorShapeError(
            f"{where}: {module}: magnitude has shape {list(magnitude.shape)}, expected [d_out], or [experts, d_out]"
        )
    experts = magnitude.shape[0] if magnitude.dim() == 2 else None
    _check_presence(where, module, tensors, "tau.raw", config.tau_kind != "zero", f"tau_kind={config.tau_kind!r}")
    _check_presence(where, module, tensors, "experts.coefficients", config.experts, f"experts={config.experts}")
    if "tau.raw" in tensors:
        size = _tau_size(config, magnitude.shape[-1], f"{where}: {module}", experts)
        check_vector(where, f"{module}.tau.raw", tensors["tau.raw"], size)
    if "experts.coefficients" in tensors and tensors["experts.coefficients"].shape != (rank,):
        shape = list(tensors["experts.coefficients"].shape)
        raise RankError(f"{where}: {module}.experts.coefficients: shape {shape}, expected [{rank}], the rank")
    if config.factors == "static":
        _check_static(where, module, tensors, rank)


def _check_presence(
    where: str, module: str, tensors: Mapping[str, Tensor], part: str, wanted: bool, because: str
) -> None:
    if wanted and part not in tensors:
        raise MissingKeyError(f"{where}: {module}: no tensor {part!r}, which {because} needs")
    if not wanted and part in tensors:
        raise UnexpectedKeyError(f"{where}: {module}: tensor {part!r}, which {because} does not have")


def _tau_size(config: DoranConfig, rows: int, where: str, experts: int | None) -> int:
    try:
        return tau_size(config, rows, where, experts)
    except ConfigError as error:  # here it is the file that is at fault
        raise AdapterFormatError(str(error)) from error


def _check_static(where: str, module: str, tensors: Mapping[str, Tensor], rank: int) -> None:
    for part in ("factors.A", "factors.B"):
        _check_presence(where, module, tensors, part, True, "factors='static'")
    A, B = tensors["factors.A"], tensors["factors.B"]
    rows = _rows(tensors)
    if tensors["magnitude"].dim() == 2:
        A, B = _first_expert(where, module, {"factors.A": A, "factors.B": B}, len(tensors["magnitude"]))
    check_pair(where, module, A, B, rank)
    if B.shape[0] != rows:
        raise TensorShapeError(f"{where}: {module}.factors.B: {B.shape[0]} rows, magnitude has {rows}")


def _rows(tensors: Mapping[str, Tensor]) -> int:
    """d_out, of one expert where the module is a stack of them."""
    return tensors["magnitude"].shape[-1]


def _first_expert(where: str, module: str, tensors: Mapping[str, Tensor], experts: int) -> list[Tensor]:
    """The first expert's part of each tensor of a stack; the others have the same shape.

    Raises:
        TensorShapeError: a tensor that is no stack of as many matrices as there are experts.
    """
    for part, tensor in tensors.items():
        if tensor.dim() != 3 or len(tensor) != experts:
            raise TensorShapeError(
                f"{where}: {module}.{part}: shape {list(tensor.shape)}, expected {experts} matrices, because the "
                f"magnitude has {experts} rows, one per expert"
            )
    return [tensor[0] for tensor in tensors.values()]


def own_generator_parts(config: DoranConfig, modules: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Names of the tensors of a custom generator, which only its author can check; empty for DoRAN's own generators.

    Args:
        config: the options.
        modules: tensors by part, by module.
    """
    if config.factors == "static":
        return []
    parts = {part for tensors in modules.values() for part in tensors if part.startswith("factors.")}
    return sorted(part for part in parts if not part.startswith((*_OUTPUTS, TRUNK, BLOCK_EMBEDDING)))


def _check_generated(where: str, config: DoranConfig, module: str, tensors: Mapping[str, Tensor]) -> None:
    rows = _rows(tensors)
    if tensors["magnitude"].dim() == 2:
        held = {part: tensors[part] for part in _OUTPUTS if part in tensors}
        tensors = {
            **tensors,
            **dict(zip(held, _first_expert(where, module, held, len(tensors["magnitude"])), strict=True)),
        }
    for part in _OUTPUTS:
        because = f"factors='generated' with share_output={config.share_output}"
        _check_presence(where, module, tensors, part, not config.share_output, because)
        if part not in tensors:
            continue
        if tensors[part].dim() != 2 or 0 in tensors[part].shape:
            shape = list(tensors[part].shape)
            raise TensorShapeError(f"{where}: {module}.{part}: shape {shape}, expected a matrix")
    if "factors.w2_B" in tensors and tensors["factors.w2_B"].shape[0] != rows:
        found = tensors["factors.w2_B"].shape[0]
        raise TensorShapeError(f"{where}: {module}.factors.w2_B: {found} rows, magnitude has {rows}")


def _check_stored_once(where: str, config: DoranConfig, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse a shared tensor that two layers contain: choosing one would be a guess."""
    for start, group_of in shared_parts(config).items():
        holders: dict[tuple[object, str], str] = {}
        for name, tensors in modules.items():
            for part in tensors:
                holder = holders.setdefault((group_of(name), part), name) if part.startswith(start) else name
                if holder != name:
                    raise UnexpectedKeyError(
                        f"{where}: {name}: tensor {part!r}, which {holder} brings, too; layers that share a network "
                        "store it once (a layer that was copied apart has networks of its own)"
                    )


def _check_trunks(where: str, config: DoranConfig, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse modules of a sharing group of which no module holds the trunk, or the shared W2 of their size."""
    groups: dict[object, list[str]] = {}
    for name in modules:
        groups.setdefault(sharing_group(name, config), []).append(name)
    for names in groups.values():
        held = {part for name in names for part in modules[name] if part.startswith(TRUNK)}
        for name in names:
            wanted = [f"{TRUNK}A.embedding", f"{TRUNK}B.embedding"]
            if config.share_output:
                wanted.append(f"{TRUNK}output_B.{_rows(modules[name])}")
            for part in wanted:
                if part not in held:
                    raise MissingKeyError(f"{where}: no tensor {part!r} in any of {names}, which {name} needs")
