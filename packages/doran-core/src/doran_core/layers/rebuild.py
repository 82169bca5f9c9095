"""Adapters built from saved tensors alone, without the model, for merging and folding on files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from doran_core.errors import MissingKeyError, TensorShapeError, UnexpectedKeyError
from doran_core.layers.adapter import DoranAdapter
from doran_core.layers.stack import StackAdapter
from doran_core.method.config import DoranConfig
from doran_core.method.factors import FactorBuilder, LayerSpec, StaticFactors
from doran_core.method.sharing import SharedTrunks, block_of, with_shared

__all__ = ["build_adapters"]


def _sizes(tensors: Mapping[str, Tensor], module: str) -> tuple[int, int | None, int | None]:
    """``(d_out, d_in, experts)`` of a module, from its tensors; d_in is None if W2 is shared."""
    if "magnitude" not in tensors:
        raise MissingKeyError(f"module {module!r}: no tensor 'magnitude' among {sorted(tensors)}")
    shape = tensors["magnitude"].shape
    experts = shape[0] if len(shape) == 2 else None
    for key in ("factors.A", "factors.w2_A"):
        if key in tensors:
            return shape[-1], tensors[key].shape[-1 if key == "factors.A" else -2], experts
    return shape[-1], None, experts


def build_adapters(
    config: DoranConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    d_in: Mapping[str, int] | None = None,
    factor_builder: FactorBuilder | None = None,
) -> dict[str, DoranAdapter]:
    """Adapters with the saved values, in eval mode. Given tensors of the right dtype are used without a copy.

    Args:
        config: the adapters' options.
        tensors: by module name, in the model's order, the tensors by their names in :class:`DoranAdapter`.
        d_in: columns of each module's weight; needed if the file lacks them: with ``share_output``, and for a custom
            generator.
        factor_builder: the one given to :func:`doran_core.adapt`, for adapters that were trained with one.

    Returns:
        One adapter per module.

    Raises:
        MissingKeyError, UnexpectedKeyError, TensorShapeError: naming the module and the tensor.
    """
    builder = factor_builder or (StaticFactors if config.factors == "static" else SharedTrunks(config).build)
    adapters = {}
    tensors = with_shared(tensors, config)
    for module in tensors:
        d_out, columns, experts = _sizes(tensors[module], module)
        columns = columns or (d_in or {}).get(module)
        if columns is None:
            raise MissingKeyError(f"module {module!r}: its input size is not in the file; pass d_in")
        spec = LayerSpec(
            module,
            block_of(module, config.block_pattern),
            columns,
            d_out,
            config.rank_for(module),
            config.scaling_for(module),
            experts,
        )
        adapter_class = DoranAdapter if experts is None else StackAdapter
        # Static factors need no memory of their own before the file's tensors take their place.
        place = "meta" if builder is StaticFactors else "cpu"
        with torch.random.fork_rng(devices=[]), torch.device(place):
            factors = builder(spec)
            adapters[module] = adapter_class(config, spec, factors).eval()
    # Load after all adapters exist: only then does each trunk have all shared outputs of its group.
    for module, adapter in adapters.items():
        _load(adapter, tensors[module], module)
    return adapters


def _load(adapter: DoranAdapter, tensors: Mapping[str, Tensor], module: str) -> None:
    expected = adapter.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing:
        raise MissingKeyError(f"module {module!r}: missing tensor(s) {missing}")
    if extra:
        raise UnexpectedKeyError(f"module {module!r}: unexpected tensor(s) {extra}; expected {sorted(expected)}")
    for key, value in expected.items():
        if value.shape != tensors[key].shape:
            raise TensorShapeError(
                f"module {module!r}, tensor {key!r}: expected shape {list(value.shape)}, got {list(tensors[key].shape)}"
            )
    adapter.load_state_dict({key: tensors[key].to(value.dtype) for key, value in expected.items()}, assign=True)
    _check_pair(adapter, module)


@torch.no_grad()
def _check_pair(adapter: DoranAdapter, module: str) -> None:
    """Refuse a generator whose factors do not have the layer's sizes."""
    A, B = adapter.factor_pair()
    spec, shapes = adapter.spec, [list(A.shape), list(B.shape)]
    expected = [[*spec.stacked, spec.rank, spec.d_in], [*spec.stacked, spec.d_out, spec.rank]]
    if shapes != expected:
        raise TensorShapeError(
            f"module {module!r}: {type(adapter.factors).__name__} gives A {shapes[0]} and B {shapes[1]}, expected "
            f"A {expected[0]} and B {expected[1]}"
        )
