"""When weight sides are computed: together at the start of a model's forward pass, kept where there are no gradients.

**With gradients**, a forward pre-hook on the model (and on the modules below it down to the lowest one that holds all
adapted layers: callers enter at any of them) opens a *window*. Until that call returns the layers take their weight
sides from it, and the first of a shape has those of all of them computed. What cannot be computed together, and a layer
called outside a window, is computed alone by the layer, under autograd.

**Recomputation.** Non-reentrant checkpointing repeats a block in the backward pass for the tensors that it saves: there
a layer takes what it took in the pass. In reentrant checkpointing every block has a backward pass of its own: there it
computes its own, for gradients that go to all layers at once would reach DistributedDataParallel once a block.

**Without gradients** each adapter keeps its weight side until a backward pass or an optimizer's step, or until one of
its inputs (W0 included) is another object, elsewhere or written to. Writes that PyTorch does not count (``.data``, as
some moving averages do) need :func:`refresh`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from doran_core.kernels.adapted_linear import LayerSide
from doran_core.kernels.backend import Implementation, get_backend
from doran_core.kernels.layer_groups import (
    LayerGroup,
    LayerInputs,
    can_be_read,
    choose_recomputed,
    compute_alone,
    group_layers,
    implementation_of,
    requires_grad,
)
from doran_core.kernels.weight_side import now, refresh
from doran_core.support import torch_internals as internals

if TYPE_CHECKING:
    from doran_core.layers.adapter import DoranAdapter
    from doran_core.layers.base import BaseView

__all__ = ["Runtime", "prepare", "unprepare", "watch_optimizers"]

_RECOMPUTED, _RECOMPUTED_UNDER_HOOKS = 1 / 16, 1 / 6
"""Recompute budgets on a GPU, as fractions of the adapted layers' products. Checkpointing, whose hooks pack what is
saved, is there to spare memory: a sixth is what the projections of attention cost."""


_watching: list[RemovableHandle] = []


def watch_optimizers() -> None:
    """Let any optimizer's step end what was computed before: fused ones write past PyTorch's counters."""
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(lambda *_: refresh()))


class _Checked:
    """What a weight side was made of and when, to be compared at each use."""

    __slots__ = ("epoch", "implementation", "inputs", "stream", "versions")

    def __init__(self, inputs: LayerInputs, implementation: Implementation) -> None:
        self.inputs, self.implementation = inputs, implementation
        self.versions, self.epoch = inputs.seen, now()
        self.stream = internals.current_stream(inputs.device)
        watch_optimizers()

    def hold(self, view: BaseView, dtype: torch.dtype) -> bool:
        """Whether nothing has changed for a call with this view and an input of this dtype."""
        inputs = self.inputs
        return (
            self.epoch == now()
            and inputs.view is view
            and inputs.implementation(dtype) == self.implementation
            and self.stream == internals.current_stream(inputs.device)
            and self.versions is not None
            and not inputs.is_random()
            and inputs.versions() == self.versions
        )


class Runtime:
    """What an adapter remembers between calls. Copies and pickles of a model get an empty one.

    Attributes:
        inputs: of its weight side, as last seen.
        kept: the weight side that is kept without gradients.
        last: what the last call under checkpointing took from a window, for its recomputation; None if nothing.
    """

    __slots__ = ("inputs", "kept", "last")

    def __init__(self) -> None:
        self.inputs: LayerInputs | None = None
        self.kept: LayerSide | None = None
        self.last: LayerSide | None = None

    def __reduce__(self) -> tuple[type[Runtime], tuple[()]]:
        return Runtime, ()

    def current_inputs(self, adapter: DoranAdapter, view: BaseView) -> LayerInputs | None:
        """The layer's inputs as they are now; None if they cannot be read, or are drawn anew by each call."""
        inputs, versions = self.inputs, None
        if inputs is not None and inputs.view is view and inputs.is_usable and inputs.weight_is_unwritten():
            versions = inputs.versions()
        if inputs is None or versions is None:
            if not can_be_read(adapter, view):
                return None
            adapter.refresh(view)
            self.inputs = inputs = LayerInputs(adapter, view)
            if not inputs.is_usable:
                return None
            versions = inputs.versions()
        inputs.seen = versions
        return None if inputs.is_random() else inputs

    def side(self, adapter: DoranAdapter, view: BaseView, x: Tensor) -> LayerSide | None:
        """The layer's weight side for one call; None if the call is the reference's.

        Raises:
            BackendError: an implementation was asked for by name and cannot run on these tensors.
        """
        learns = torch.is_grad_enabled()
        side = _from_window(adapter)
        if side is None and not learns:
            side = self.kept
        # An interrupt skips the hook that closes a window: so a weight side is checked when it is used, too.
        if side is None or not side.checked.hold(view, x.dtype):
            side, implementation = None, implementation_of(adapter, view, x)
            if implementation == "reference":
                return None
            if not learns:
                return self._computed_and_kept(adapter, view, implementation)
        if not learns:
            return side
        self.kept = None
        if internals.has_saved_tensor_hooks():
            if side is None and internals.backward_pass() != -1:
                side = self.last
            else:
                self.last = side
        return compute_alone(adapter, view, implementation) if side is None else side

    def _computed_and_kept(self, adapter: DoranAdapter, view: BaseView, implementation: Implementation) -> LayerSide:
        self.kept = None  # free the old one before the new one is made
        with torch.inference_mode(False), torch.no_grad():
            # FSDP2 gathers new values into the same tensors uncounted.
            inputs = None if internals.uses_fully_shard() else self.current_inputs(adapter, view)
            side = compute_alone(adapter, view, implementation)
            if inputs is not None and not (view.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                side.checked, self.kept = _Checked(inputs, implementation), side
        return side


class _Window:
    """The weight sides of one forward pass with gradients; it may be the repetition of a backward pass.

    Those of a shape are computed when one of its layers first asks: then the GPU has work while Python goes on.
    """

    def __init__(self, opener: nn.Module, model: _Model, groups: list[LayerGroup]) -> None:
        self.opener, self.model, self.backward_pass = opener, model, internals.backward_pass()
        self.groups = {member.adapter: group for group in groups for member in group.members}
        self._sides: dict[DoranAdapter, LayerSide] = {}

    def side(self, adapter: DoranAdapter) -> LayerSide:
        """The weight side of one of the layers."""
        side = self._sides.get(adapter)
        if side is None:
            self._compute(self.groups[adapter])
            side = self._sides[adapter]
        return side

    def _compute(self, group: LayerGroup) -> None:
        for member in group.members:
            member.adapter.runtime.last = None  # free the old ones before the new ones are made
        # A checkpointed block that asks first must not take what is computed here for its own, to be done again.
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            sides = group.compute()
        for member, side, choice in zip(group.members, sides, group.recomputed, strict=True):
            side.recomputes, side.checked = choice, _Checked(member, group.implementation)
            if side.ports is not None and not any(map(requires_grad, member.columns.values())):
                A, B, c = side.ports  # others of its shape train, it does not
                side.ports = A.detach(), B.detach(), c.detach()
            self._sides[member.adapter] = side


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Windows(threading.local):
    def __init__(self) -> None:
        self.open: list[_Window] = []


_windows = _Windows()


def _from_window(adapter: DoranAdapter) -> LayerSide | None:
    """From the innermost open window that has the adapter; None if there is none."""
    for window in reversed(_windows.open):
        if adapter in window.groups and window.backward_pass == internals.backward_pass():
            return window.side(adapter)
    return None


class _Model:
    """The adapted layers below a module, and their groups."""

    def __init__(self, module: nn.Module) -> None:
        self.layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "adapter_in_use")]
        self._inputs: list[tuple[LayerInputs, Implementation]] = []
        self._groups: list[LayerGroup] = []

    def groups(self) -> list[LayerGroup]:
        """Those of what the layers' next calls will use, as it is now."""
        pairs = [layer.adapter_in_use() for layer in self.layers]
        found = [pair[0].runtime.current_inputs(*pair) for pair in pairs if pair is not None]
        inputs = [(each, each.implementation(each.dtype)) for each in found if each is not None]
        if inputs != self._inputs:
            self._inputs, self._groups = inputs, group_layers(inputs)
            # Which outputs are kept is decided by sizes alone, so that a resumed run has the same bits.
            fused = [group for group in self._groups if group.implementation == "triton"]
            sizes = [size for group in fused for size in group.sizes]
            choices = (choose_recomputed(sizes, share) for share in (_RECOMPUTED, _RECOMPUTED_UNDER_HOOKS))
            chosen = iter(zip(*choices, strict=True))
            for group in fused:
                group.recomputed = [next(chosen) for _ in group.sizes]
        return self._groups


_models: WeakKeyDictionary[nn.Module, _Model] = WeakKeyDictionary()
"""The same for all modules from a root down to the lowest one that holds all its adapted layers."""


def open_window(module: nn.Module, args: object) -> None:
    """Forward pre-hook: offer the weight sides of the layers below, unless a call further out does."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or get_backend() == "reference":
        return
    if internals.is_replica(module) or internals.needs_single_operations() or internals.uses_fully_shard():
        return
    _windows.open = [window for window in _windows.open if window.opener is not module]  # what an interrupt left open
    model = _models.get(module) or _layers_of(module)  # none in a copy of a model, which has its hooks
    if any(window.model is model for window in _windows.open):
        return
    groups = model.groups()
    if groups and not any(groups[0].members[0].adapter in window.groups for window in _windows.open):
        _windows.open.append(_Window(module, model, groups))


def close_window(module: nn.Module, args: object, output: object) -> None:
    """Forward hook, called after errors, too: end what this module's call opened."""
    if torch.compiler.is_compiling():
        return
    if _windows.open and _windows.open[-1].opener is module:
        _windows.open.pop()


_OURS = (open_window, close_window).__contains__


def prepare(root: nn.Module) -> None:
    """Let the weight sides of all adapted layers of a model be computed together. Call it again when layers were added.

    Args:
        root: the model, or a wrapper of it. Layers are the modules with a method ``adapter_in_use``, which gives the
            adapter that the next call uses and the view of its base layer, or None.
    """
    _layers_of(root)
    for module in _path(root):
        internals.remove_hooks(module, _OURS)
        module.register_forward_pre_hook(open_window)
        module.register_forward_hook(close_window, always_call=True)


def _layers_of(root: nn.Module) -> _Model:
    model = _Model(root)
    _models.update(dict.fromkeys(_path(root), model))
    return model


def unprepare(root: nn.Module) -> None:
    """Take :func:`prepare`'s hooks away."""
    for module in root.modules():
        internals.remove_hooks(module, _OURS)


def _path(root: nn.Module) -> Iterator[nn.Module]:
    """The modules from the root down to the lowest one that holds all adapted layers."""
    count = sum(hasattr(module, "adapter_in_use") for module in root.modules())
    node: nn.Module | None = root if count else None
    while node is not None and not hasattr(node, "adapter_in_use"):
        if not isinstance(node, nn.ModuleList | nn.ModuleDict):
            yield node
        children = node.children()
        node = next((c for c in children if sum(hasattr(m, "adapter_in_use") for m in c.modules()) == count), None)
