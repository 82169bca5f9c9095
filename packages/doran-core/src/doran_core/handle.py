"""The handle of an adapted model: trainable parameters, saving, loading, merging, and removal of the adapters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from doran_core import kernels
from doran_core.adapter import (
    FoldedAdapter,
    TrainableAdapter,
    read_adapter,
    write_folded,
    write_trainable,
)
from doran_core.adapter.apply import apply_adapter
from doran_core.adapter.folded import fold_module
from doran_core.checkpoint.fingerprint import combine_digests
from doran_core.checkpoint.ties import tied_parameters
from doran_core.errors import AdapterFormatError, ConfigError, DoranError, TargetError
from doran_core.layers.base import BaseView
from doran_core.layers.modules import AdaptedLayer
from doran_core.layers.statistics import forget_statistics, warn_moved_statistics
from doran_core.layers.traced import share_blocks
from doran_core.layers.uncalled import unpad_encoders, warn_uncalled
from doran_core.method.config import DoranConfig
from doran_core.method.optimizer_groups import parameter_groups
from doran_core.support.names import plain_modules, plain_name
from doran_core.support.sharding import first_process, gathered, reshard, whole

__all__ = ["DoranHandle", "read_trainable", "set_trained"]


def set_trained(trained: list[tuple[nn.Parameter, bool]]) -> None:
    """Make parameters trainable or not, as recorded."""
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def read_trainable(path: str | os.PathLike[str]) -> TrainableAdapter:
    """Read a directory that must contain a trainable adapter.

    Raises:
        AdapterFormatError: the directory is damaged, or contains an adapter of another form.
    """
    saved = read_adapter(path)
    if not isinstance(saved, TrainableAdapter):
        raise AdapterFormatError(
            f"{Path(path)}: expected a trainable DoRAN adapter (peft_type DORAN), got {type(saved).__name__}"
        )
    return saved


class DoranHandle:
    """The handle that :func:`~doran_core.adapt` returns.

    Attributes:
        model: the adapted model, changed in place.
        config: the options.
        layers: the adapted layers by their names, in the model's order.
        modules_to_save: names of the modules that are trained in full.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DoranConfig,
        layers: dict[str, AdaptedLayer],
        modules_to_save: list[str],
        places: list[tuple[str, AdaptedLayer]],
        trained: list[tuple[nn.Parameter, bool]],
    ) -> None:
        self.model = model
        self.config = config
        self.layers = layers
        self.modules_to_save = modules_to_save
        self._places = places
        self._trained = trained
        self._removed = False

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters of the adapters and of ``modules_to_save``, each once."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def parameter_groups(self, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for an optimizer: magnitude, tau and one-dimensional parameters do not decay.

        Args:
            weight_decay: of the matrices: the factors or their networks, and those of ``modules_to_save``.

        Raises:
            ConfigError: a negative or not finite weight decay.
        """
        return parameter_groups(self.named_parameters(), weight_decay=weight_decay)

    def penalty(self) -> Tensor:
        """The penalty on the factors, averaged over the layers, to add to the loss. 0 if ``factor_penalty`` is 0."""
        if self.config.factor_penalty == 0.0:
            return torch.zeros(())
        parts = [layer.doran_adapter.penalty() for layer in self.layers.values()]
        return torch.stack([part.to(parts[0].device) for part in parts]).mean()

    def tau(self) -> dict[str, Tensor]:
        """tau of each layer at inference, detached: ``[1]``, or ``[d_out]`` per head or row."""
        return {name: layer.doran_adapter.tau.value().detach() for name, layer in self.layers.items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the model is the base model, merged or not."""
        self._refuse_removed()
        before = [(layer, layer.enabled, layer.merged) for layer in self.layers.values()]
        is_merged = any(layer.merged for layer in self.layers.values())
        if is_merged:
            reshard(self.model)
        try:
            for layer in self.layers.values():
                layer.unmerge()
                layer.enabled = False
            yield
        finally:
            if is_merged:
                reshard(self.model)
            for layer, enabled, merged in before:
                layer.enabled = enabled
                if merged:
                    layer.merge()

    def merge(self, *, check_finite: bool = False) -> None:
        """Replace every W0 by its W'. Each W0 stays in memory for :meth:`unmerge`.

        Raises:
            NonFiniteError: if a merged weight is not finite and ``check_finite``; nothing stays merged then.
            TargetError: if a base layer gives no access to its weight.
            DoranError: after :meth:`remove`.
        """
        self._refuse_removed()
        self._warn_uncalled("merging still changes their weights")
        reshard(self.model)
        try:
            for layer in self.layers.values():
                layer.merge(check_finite=check_finite)
        except Exception:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Put every W0 back, bit for bit."""
        self._refuse_removed()
        reshard(self.model)
        for layer in self.layers.values():
            layer.unmerge()

    def remove(self, *, merged: bool = False) -> nn.Module:
        """Remove the adapters. The handle cannot be used afterwards.

        Args:
            merged: leave W' in the layers instead of W0.

        Returns:
            The model, with its own layers again, and trainable where it was before :func:`adapt`.

        Raises:
            DoranError: if they were taken out before.
        """
        (self.merge if merged else self.unmerge)()
        trained = {id(parameter) for parameter, requires_grad in self._trained if requires_grad}
        for place, layer in self._places:
            layer.release(trained)
            self.model.set_submodule(place, layer.base_layer)
        unpad_encoders(self.model)
        forget_statistics(self.model)
        kernels.unprepare(self.model)
        share_blocks(self.model)
        set_trained(self._trained)
        self._removed = True
        return self.model

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute everything cached from weights and parameters, including ``||W0||^2``.

        Call this after writes that PyTorch does not count: through ``.data``, as some moving averages do, or from
        outside PyTorch. All other writes are noticed.
        """
        self._refuse_removed()
        for layer in self.layers.values():
            if not layer.merged:
                layer.doran_adapter.reset_base(layer.view)
        kernels.refresh()

    def _refuse_removed(self) -> None:
        if self._removed:
            raise DoranError("this handle's adapters were removed from the model; call adapt() for a new one")

    def _saved_modules(self) -> dict[str, nn.Module]:
        modules = plain_modules(self.model)
        return {name: modules[name] for name in self.modules_to_save}

    def _warn_uncalled(self, doing: str) -> None:
        warn_uncalled((layer.doran_adapter for layer in self.layers.values()), doing)

    def base_fingerprint(self) -> str | None:
        """Fingerprint of the adapted weights; None if one is quantized or float16, whose values are not exact."""
        digests = []
        for name, layer in self.layers.items():
            digest = layer.base_digest()
            if digest is None:
                return None
            digests.append((name, digest))
        return combine_digests(digests)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        form: Literal["trainable", "folded", "compiled"] = "trainable",
        base_model: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the adapter directory, atomically.

        Under FSDP2 and ZeRO-3 all processes must call this, and rank 0 writes; under FSDP1 likewise, inside
        ``FullyShardedDataParallel.summon_full_params(model)``. Under DDP call it in one process.

        Args:
            path: the directory.
            form: "trainable" to train on; "folded" (A, B and c, a valid PEFT DoRA adapter) to serve and share.
                "compiled" is the former name of "folded".
            base_model: name or path of the base model, a hint for readers.
            overwrite: replace an existing adapter.

        Raises:
            ConfigError: for another form.
            AdapterFormatError: if a parameter is not finite; nothing is written then.
            DoranError: if an adapter is there already and ``overwrite`` is not set.
        """
        self._warn_uncalled("their adapters are saved as they are")
        warn_moved_statistics(self.model, self.modules_to_save)
        if form == "compiled":
            warnings.warn('form="compiled" is called "folded" now', DeprecationWarning, stacklevel=2)
            form = "folded"
        if form not in ("trainable", "folded"):
            raise ConfigError(f"form: expected 'trainable' or 'folded', got {form!r}")
        # All processes take part in gathering. The first one writes; the others wait.
        record = self._trainable(base_model) if form == "trainable" else self.folded(base_model)
        with first_process(self.parameters()) as writes:
            if writes and isinstance(record, TrainableAdapter):
                write_trainable(record, path, overwrite=overwrite)
            elif writes and isinstance(record, FoldedAdapter):
                write_folded(record, path, overwrite=overwrite)
        return Path(path)

    def load(self, path: str | os.PathLike[str], *, allow_base_mismatch: bool = False) -> None:
        """Load the values of a saved trainable adapter with the same layers, in any order, and the same options.

        Raises:
            AdapterFormatError: if it does not fit, or was made with options that give another function; nothing is
                changed then.
            BaseMismatchError: if the fingerprints of the base weights differ.
        """
        self.load_record(read_trainable(path), path, allow_base_mismatch)

    @torch.no_grad()
    def folded(self, base_model: str | None = None) -> FoldedAdapter:
        """The folded form, in memory: the networks run once, g and experts baked into B."""
        modules = {}
        for name, layer in self.layers.items():
            view = layer.view
            with layer.whole_weight() as weight, gathered(layer.doran_adapter, recurse=True):
                if weight is None:
                    hides = f"which {type(view.layer).__name__} hides"
                    raise TargetError(f"{name}: folding needs the base weight, {hides}")
                modules[name] = fold_module(
                    name, layer.doran_adapter, weight, kind=_file_kind(view), kernel=_kernel(view)
                )
        return FoldedAdapter(
            modules,
            extra=self._extra(),
            base_fingerprint=self.base_fingerprint(),
            base_model=base_model,
            modules_to_save=self.config.modules_to_save,
            ties=tied_parameters(self.model),
        )

    def compiled(self, base_model: str | None = None) -> FoldedAdapter:
        """The former name of :meth:`folded`."""
        warnings.warn("handle.compiled() is called folded() now", DeprecationWarning, stacklevel=2)
        return self.folded(base_model)

    def _trainable(self, base_model: str | None) -> TrainableAdapter:
        return TrainableAdapter(
            config=self.config,
            modules=self._tensors(),
            extra=self._extra(),
            base_fingerprint=self.base_fingerprint(),
            base_model=base_model,
            module_kinds={
                name: kind for name, layer in self.layers.items() if (kind := _file_kind(layer.view)) != "linear"
            },
            ties=tied_parameters(self.model),
        )

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each layer, shared ones with the first layer that has them."""
        seen: dict[int, str] = {}
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.layers.items():
            layer.view.refuse_flattened()
            with gathered(layer.doran_adapter, recurse=True):
                held = layer.doran_adapter.state_dict(keep_vars=True)
                own = {key: value for key, value in held.items() if seen.setdefault(id(value), name) == name}
                tensors[name] = {key: whole(value, f"{name}.{key}").cpu().clone() for key, value in own.items()}
        return tensors

    def _extra(self) -> dict[str, Tensor]:
        extra = {}
        for name, module in self._saved_modules().items():
            with gathered(module, recurse=True):
                for key, value in module.state_dict().items():
                    extra[plain_name(f"{name}.{key}")] = whole(value, f"{name}.{key}").cpu().clone()
        return extra

    def load_record(self, saved: TrainableAdapter, path: str | os.PathLike[str], allow_base_mismatch: bool) -> None:
        """As :meth:`load`, from a record that was read already; `path` is for messages."""
        apply_adapter(
            saved,
            {name: layer.doran_adapter for name, layer in self.layers.items()},
            self._saved_modules(),
            self.config,
            None if allow_base_mismatch else self.base_fingerprint(),
            Path(path),
        )


def _file_kind(view: BaseView) -> Any:
    return "linear" if view.kind == "opaque" else view.kind


def _kernel(view: BaseView) -> tuple[int, ...] | None:
    return tuple(view.layer.weight.shape[1:]) if isinstance(view.layer, nn.Conv2d) else None
