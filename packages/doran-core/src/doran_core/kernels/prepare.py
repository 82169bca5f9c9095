"""When weight sides are computed: together at the start of a model's forward pass, kept where there are no gradients.

**With gradients**, a forward pre-hook on the model (and on the modules below it down to the lowest one that holds all
adapted layers: callers enter at any of them) computes the weight sides of all layers at once and opens a *window*; the
layers take theirs from it until the call that opened it returns. What cannot be computed together, and a layer called
outside a window, is computed alone by the layer, under autograd.

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
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from doran_core.kernels import torch_internals as internals
from doran_core.kernels.adapted_linear import LayerSide
from doran_core.kernels.backend import Implementation, choose, get_backend
from doran_core.kernels.layer_groups import (
    LayerGroup,
    LayerInputs,
    choose_recomputed,
    compute_alone,
    group_layers,
    has_known_parts,
    is_ordinary,
    is_supported,
)
from doran_core.kernels.weight_side import forget, now

if TYPE_CHECKING:
    from doran_core.layers.adapter import DoranAdapter
    from doran_core.layers.base import BaseView

__all__ = ["Runtime", "prepare", "refresh", "unprepare"]

_RECOMPUTED, _RECOMPUTED_UNDER_HOOKS = 1 / 16, 1 / 6
"""Recompute budgets on a GPU, as fractions of the adapted layers' products. Checkpointing, whose hooks pack what is
saved, is there to spare memory: a sixth is what the projections of attention cost."""


_watching: list[RemovableHandle] = []


class _Checked:
    """What a weight side was made of and when, to be compared at each use."""

    __slots__ = ("epoch", "implementation", "inputs", "stream", "versions")

    def __init__(self, inputs: LayerInputs, implementation: Implementation) -> None:
        self.inputs, self.implementation = inputs, implementation
        self.versions, self.epoch = inputs.versions(), now()
        self.stream = internals.current_stream(inputs.device)
        if not _watching:  # fused optimizers write past PyTorch's counters: a step of any ends what was computed before
            _watching.append(register_optimizer_step_post_hook(lambda *_: forget()))

    def hold(self, view: BaseView, implementation: Implementation) -> bool:
        return (
            self.epoch == now()
            and self.implementation == implementation
            and self.inputs.view is view
            and self.stream == internals.current_stream(self.inputs.device)
            and self.inputs.hold()
            and self.inputs.versions() == self.versions
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
        inputs = self.inputs
        known = inputs is not None and inputs.view is view and inputs.is_usable
        if inputs is None or not known or not inputs.hold() or not inputs.weight_is_unwritten():
            weight = view.weight()
            if not has_known_parts(adapter) or (weight is not None and not is_ordinary(weight)):
                return None
            adapter.refresh(view)
            self.inputs = inputs = LayerInputs(adapter, view)
        return None if not inputs.is_usable or inputs.is_random() else inputs

    def side(self, adapter: DoranAdapter, view: BaseView, implementation: Implementation) -> LayerSide:
        """The layer's weight side for one call."""
        if torch.is_grad_enabled():
            return self._with_gradients(adapter, view, implementation)
        side = _from_window(adapter, view, implementation) or self.kept
        if side is not None and side.checked.hold(view, implementation):
            return side
        self.kept = None  # free the old one before the new one is made
        with torch.inference_mode(False), torch.no_grad():
            inputs = self.current_inputs(adapter, view)
            side = compute_alone(adapter, view, implementation)
            if inputs is not None and not _is_capturing(view.device):
                side.checked, self.kept = _Checked(inputs, implementation), side
        return side

    def _with_gradients(self, adapter: DoranAdapter, view: BaseView, implementation: Implementation) -> LayerSide:
        self.kept = None
        side = _from_window(adapter, view, implementation)
        if internals.has_saved_tensor_hooks():
            if side is None and internals.backward_pass() != -1:
                side = self.last
            else:
                self.last = side
        return compute_alone(adapter, view, implementation) if side is None else side


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refresh() -> None:
    """Use no weight side again that was computed before; call it after writes that PyTorch does not count."""
    forget()


class _Window:
    """The weight sides of one forward pass with gradients, by adapter; it may be the repetition of a backward pass."""

    def __init__(self, opener: nn.Module, sides: dict[DoranAdapter, LayerSide]) -> None:
        self.opener, self.sides, self.backward_pass = opener, sides, internals.backward_pass()
        self.was_asked = False


class _Windows(threading.local):
    def __init__(self) -> None:
        self.open: list[_Window] = []


_windows = _Windows()


def _from_window(adapter: DoranAdapter, view: BaseView, implementation: Implementation) -> LayerSide | None:
    """From the innermost open window that has the adapter; None if there is none or its inputs have changed."""
    for window in reversed(_windows.open):
        window.was_asked = True
        side = window.sides.get(adapter)
        if side is not None and window.backward_pass == internals.backward_pass():
            # An interrupt skips the hook that closes a window: so a weight side is checked when it is used, too.
            return side if side.checked.hold(view, implementation) else None
    return None


class _Model:
    """The adapted layers below a module, and their groups."""

    def __init__(self, module: nn.Module) -> None:
        self.asks = True  # blocks that torch.compile compiles one by one never ask for what their model prepares
        self.layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "adapter_in_use")]
        self._inputs: list[tuple[LayerInputs, Implementation]] = []
        self._groups: list[LayerGroup] = []
        self._recomputed: list[list[tuple[bool, bool]]] = []

    def current(self) -> Iterator[tuple[LayerInputs, Implementation]]:
        """The inputs of what the layers' next calls will use."""
        for layer in self.layers:
            pair = layer.adapter_in_use()
            if pair is None or not is_supported(*pair):
                continue
            inputs = pair[0].runtime.current_inputs(*pair)
            if inputs is not None:
                yield inputs, _implementation(inputs)

    def compute(self) -> dict[DoranAdapter, LayerSide]:
        """The weight sides by adapter."""
        inputs = list(self.current())
        if inputs != self._inputs:
            self._regroup(inputs)
        for group in self._groups:
            for member in group.members:
                member.adapter.runtime.last = None  # free the old ones before the new ones are made
        found: dict[DoranAdapter, LayerSide] = {}
        for group, recomputed in zip(self._groups, self._recomputed, strict=True):
            for member, side, choice in zip(group.members, group.compute(), recomputed, strict=True):
                side.recomputes, side.checked = choice, _Checked(member, group.implementation)
                if side.ports is not None and not any(tensor.requires_grad for tensor in member.columns.values()):
                    A, B, c = side.ports  # others of its shape train, it does not
                    side.ports = A.detach(), B.detach(), c.detach()
                found[member.adapter] = side
        return found

    def _regroup(self, inputs: list[tuple[LayerInputs, Implementation]]) -> None:
        self._inputs, self._groups = inputs, group_layers(inputs)
        fused = [group for group in self._groups if group.implementation == "triton"]
        sizes = [size for group in fused for size in group.sizes]
        choices = iter(
            zip(choose_recomputed(sizes, _RECOMPUTED), choose_recomputed(sizes, _RECOMPUTED_UNDER_HOOKS), strict=True)
        )
        self._recomputed = [
            [next(choices) if group.implementation == "triton" else (False, False) for _ in group.members]
            for group in self._groups
        ]


def _implementation(inputs: LayerInputs) -> Implementation:
    backend = get_backend()
    if inputs.implementation is not None and inputs.implementation[0] == backend:
        return inputs.implementation[1]
    wide = inputs.columns["magnitude"].dtype
    weight = inputs.view.weight()
    dtype = wide if wide.itemsize > 4 or weight is None else weight.dtype
    inputs.implementation = backend, choose(inputs.device, dtype)
    return inputs.implementation[1]


_models: WeakKeyDictionary[nn.Module, _Model] = WeakKeyDictionary()
_handles: WeakKeyDictionary[nn.Module, tuple[RemovableHandle, RemovableHandle]] = WeakKeyDictionary()


def open_window(module: nn.Module, args: object) -> None:
    """Forward pre-hook: compute the weight sides of the layers below, unless a call further out did."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or get_backend() == "reference":
        return
    if internals.is_replica(module) or internals.has_transforms() or internals.uses_fully_shard():
        return
    if internals.has_tensor_mode() or internals.is_tracing():
        return
    _windows.open = [window for window in _windows.open if window.opener is not module]  # what an interrupt left open
    model = _models.get(module)
    if model is None:
        _models[module] = model = _Model(module)
    if any(_covers(window, model) for window in _windows.open):
        return
    _windows.open.append(_Window(module, model.compute() if model.asks else {}))


def close_window(module: nn.Module, args: object, output: object) -> None:
    """Forward hook, called after errors, too: end what this module's call opened."""
    if torch.compiler.is_compiling():
        return
    if _windows.open and _windows.open[-1].opener is module:
        window = _windows.open.pop()
        if module in _models and (window.was_asked or window.sides):
            _models[module].asks = window.was_asked


def _covers(window: _Window, model: _Model) -> bool:
    """Whether the window has the weight sides of one of the model's layers, and so of all that can have one."""
    pairs = (layer.adapter_in_use() for layer in model.layers)
    return any(pair is not None and pair[0] in window.sides for pair in pairs)


def prepare(root: nn.Module) -> None:
    """Let the weight sides of all adapted layers of a model be computed together. Call it again when layers were added.

    Args:
        root: the model, or a wrapper of it. Layers are the modules with a method ``adapter_in_use``, which gives the
            adapter that the next call uses and the view of its base layer, or None.
    """
    for module in _path(root):
        _models.pop(module, None)
        if module not in _handles:
            opens = module.register_forward_pre_hook(open_window)
            _handles[module] = opens, module.register_forward_hook(close_window, always_call=True)


def unprepare(root: nn.Module) -> None:
    """Take :func:`prepare`'s hooks away."""
    for module in root.modules():
        for handle in _handles.pop(module, ()):
            handle.remove()


def _path(root: nn.Module) -> Iterator[nn.Module]:
    """The modules from the root down to the lowest one that holds all adapted layers."""
    count = sum(hasattr(module, "adapter_in_use") for module in root.modules())
    node: nn.Module | None = root if count else None
    while node is not None and not hasattr(node, "adapter_in_use"):
        if not isinstance(node, nn.ModuleList | nn.ModuleDict):
            yield node
        children = node.children()
        node = next((c for c in children if sum(hasattr(m, "adapter_in_use") for m in c.modules()) == count), None)
