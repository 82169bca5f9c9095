"""What a layer gets of a weight side, and what it sends back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = [
    "RECOMPUTED",
    "RECOMPUTED_UNDER_HOOKS",
    "Keepers",
    "Part",
    "Sent",
    "Side",
    "Sides",
    "Smallness",
    "recomputed",
    "together",
]

RECOMPUTED = 1 / 16
RECOMPUTED_UNDER_HOOKS = 1 / 6
"""Share of the adapted layers' products with W0, forward and backward, that may be done once more so that some outputs
need not be kept; and under hooks on saved tensors, as of checkpointing, which are there to spare memory: what a block
keeps is then all of the memory, and a sixth is what the projections of attention cost."""


def recomputed(sizes: Sequence[Sequence[int]], share: float, kept_anyway: Sequence[bool]) -> list[bool]:
    """Which layers, by their ``[d_out, d_in]``, do not keep their output.

    A kept output costs d_out numbers a token, and computing it again d_in times as many operations: so those of fewest
    columns come first, and of these those of fewest rows. An output that others keep costs nothing.
    """
    left = share * 2 * sum(d_out * d_in for d_out, d_in in sizes)
    chosen = [False] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (sizes[i][1], sizes[i][0])):
        work = sizes[index][0] * sizes[index][1]
        if work <= left and not kept_anyway[index]:
            chosen[index], left = True, left - work
    return chosen


class Keepers:
    """Finds out which outputs other operations keep: attention its values, an activation its input.

    Seen once, in a pass: by how many tensors own an output's memory when the layer has just made it and when the
    backward pass begins. The layer's caller has let go of it then.

    Args:
        count: of layers.
        tell: is called with the answer, for each layer.
    """

    def __init__(self, count: int, tell: Callable[[list[bool]], None]) -> None:
        self._outputs: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count, self._tell = count, tell
        self._done = False

    def note(self, layer: int, output: Tensor, *, is_kept: bool) -> None:
        """A layer's output, in the layer's own forward, and whether the layer is going to keep it itself."""
        memory = StorageWeakRef(output.untyped_storage())  # type: ignore[no-untyped-call]
        self._outputs[layer] = memory, torch._C._storage_Use_Count(memory.cdata) + is_kept

    def look(self) -> None:
        """Call this at the beginning of a backward pass; a second call does nothing."""
        if self._done:
            return
        self._done = True
        kept = [False] * self._count
        for layer, (memory, owners) in self._outputs.items():
            gone = memory.expired()  # type: ignore[no-untyped-call]
            kept[layer] = not gone and torch._C._storage_Use_Count(memory.cdata) >= owners
        self._outputs.clear()
        self._tell(kept)


class Smallness:
    """Which layers have a scale too near 0 for their output to stand in for their base's; on its way to the host."""

    def __init__(self, least: Tensor, thresholds: Sequence[float]) -> None:
        self._thresholds = thresholds
        self._event: torch.cuda.Event | None = None
        self._small: list[bool] | None = None
        self._least = least
        if least.is_cuda:
            self._least = torch.empty(least.shape, dtype=least.dtype, pin_memory=True)
            self._least.copy_(least, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def __getitem__(self, layer: int) -> bool:
        if self._small is None:
            if self._event is not None:
                self._event.synchronize()  # recorded a whole forward ago
            least: list[float] = self._least.amin(1).tolist()
            # not (a >= b): a scale that is not a number is small
            self._small = [not value >= bound for value, bound in zip(least, self._thresholds, strict=True)]
        return self._small[layer]


class Part(NamedTuple):
    """What the layers of one shape get; the first dimension is the layer.

    Attributes:
        A: ``[layers, r, d_in]`` in their dtype.
        scaled_B: ``[layers, d_out, r]``, likewise.
        scale: ``[layers, d_out]`` float32.
        smallness: of it.
    """

    A: Tensor
    scaled_B: Tensor
    scale: Tensor
    smallness: Smallness


class Sent(NamedTuple):
    """What a layer's backward tells of one of its calls.

    Attributes:
        graph_task: of the backward pass, by PyTorch's number.
        for_A: the branch's gradient of A, ``[r, d_in]`` float32.
        for_B: ``P = G^T x A^T``, ``[d_out, r]`` float32.
        sums: of :meth:`Passes.scale_gradient`, ``[parts, d_out]`` float32.
        of_output: these are of the layer's output, not of its base's.
    """

    graph_task: int
    for_A: Tensor
    for_B: Tensor
    sums: Tensor
    of_output: bool


class Side:
    """What one layer gets.

    Attributes:
        A: ``[r, d_in]`` in the layer's dtype.
        scaled_B: ``B'``, ``[d_out, r]``, likewise.
        scale: ``c``, ``[d_out]`` float32.
        recomputes: the layer is not to keep its output, but to compute its base's output again.
        recomputes_under_hooks: likewise, for a call under hooks on saved tensors.
        keepers: to be told of its output, and of the beginning of a backward pass; None if they know enough.
        layer: its number there.
        sent: what its backward told, of calls that the weight side's backward has not taken yet.
    """

    __slots__ = (
        "A", "_index", "_smallness", "keepers", "layer", "recomputes", "recomputes_under_hooks", "scale", "scaled_B",
        "sent",
    )  # fmt: skip

    def __init__(
        self,
        part: Part,
        index: int,
        layer: int,
        keepers: Keepers | None,
        *,
        recomputes: bool,
        recomputes_under_hooks: bool,
    ) -> None:
        self.A, self.scaled_B, self.scale = part.A[index], part.scaled_B[index], part.scale[index]
        self.recomputes, self.recomputes_under_hooks = recomputes, recomputes_under_hooks
        self.keepers, self.layer = keepers, layer
        self.sent: list[Sent] = []
        self._smallness, self._index = part.smallness, index

    def is_small(self) -> bool:
        """Whether some ``|c|`` is too near 0 for the output to tell the base's output."""
        return self._smallness[self._index]

    def take(self, graph_task: int) -> list[Sent]:
        """What was sent in this backward pass."""
        taken = [sent for sent in self.sent if sent.graph_task == graph_task]
        self.sent = [sent for sent in self.sent if sent.graph_task != graph_task]
        return taken


class Sides:
    """What each layer gets, put together when it is asked for.

    Args:
        parts: shape by shape.
        places: of each layer, the number of its shape and its own there.
        recomputes: see :class:`Side`, of each layer.
        recomputes_under_hooks: likewise.
        keepers: likewise, of all.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        places: Sequence[tuple[int, int]],
        recomputes: Sequence[bool],
        recomputes_under_hooks: Sequence[bool],
        keepers: Keepers | None,
    ) -> None:
        self._parts, self._places, self._keepers = parts, places, keepers
        self._repeats, self._recomputes_under_hooks = recomputes, recomputes_under_hooks
        self._sides: dict[int, Side] = {}

    def __getitem__(self, layer: int) -> Side:
        side = self._sides.get(layer)
        if side is None:
            shape, index = self._places[layer]
            again = {"recomputes": self._repeats[layer], "recomputes_under_hooks": self._recomputes_under_hooks[layer]}
            self._sides[layer] = side = Side(self._parts[shape], index, layer, self._keepers, **again)
        return side

    def take(self, graph_task: int) -> list[list[Sent]]:
        """What each layer sent in this backward pass."""
        return [
            self._sides[layer].take(graph_task) if layer in self._sides else [] for layer in range(len(self._places))
        ]


def together(sent: Sequence[Sent], B: Tensor, scale: Tensor, scaling: float) -> Sent | None:
    """The sum over a layer's calls; None if there were none."""
    if len(sent) < 2:
        return sent[0] if sent else None
    every = all(each.of_output for each in sent)
    sums = []
    for each in sent:
        total = each.sums
        if each.of_output and not every:  # y - bias = c (z + g B h), summed with G
            total = torch.zeros_like(total)
            total[0] = each.sums.sum(0) / scale - scaling * (each.for_B * B).sum(1)
        sums.append(total)
    for_A, for_B = (torch.stack(factors).sum(0) for factors in ([e.for_A for e in sent], [e.for_B for e in sent]))
    return Sent(sent[0].graph_task, for_A, for_B, torch.stack(sums).sum(0), every)
