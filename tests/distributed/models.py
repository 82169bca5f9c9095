"""Tiny models, adapted by doran-core, doran-hf or PEFT's LoRA, and what they are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from devices import here
from strategies import Options, Spread, spread
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Adaptation", "Block", "Model", "Outcome", "adapted", "batches", "handle_of", "train"]

WIDTH = 32
TARGETS = ("query", "value", "up", "down")


class Block(nn.Module):
    """A residual block; it checkpoints itself as `checkpointing` says: "", "plain" or "reentrant"."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.checkpointing = ""

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointing or not self.training:
            return self._forward(x)
        return checkpoint(self._forward, x, use_reentrant=self.checkpointing == "reentrant")  # type: ignore[no-any-return]

    def _forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.query(x)) * self.value(x)
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Tokens to logits."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).requires_grad_(torch.is_grad_enabled())
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(here(), dtype)


@dataclass(frozen=True)
class Adaptation:
    """What adapts the model: "core", "hf" or "lora", with options of the method."""

    method: str = "core"
    options: dict[str, Any] = field(default_factory=dict)
    checkpointing: str = ""


def adapted(
    how: Adaptation,
    dtype: torch.dtype = torch.float32,
    model: nn.Module | None = None,
    targets: Sequence[str] = TARGETS,
) -> nn.Module:
    """A model with its adapter, the same in each process; doran-core's handle is its attribute `doran_handle`."""
    model = make_model(dtype) if model is None else model
    for module in model.modules():
        if isinstance(module, Block):
            module.checkpointing = how.checkpointing
    torch.manual_seed(1)
    options = {"target_modules": list(targets), **how.options}
    if how.method == "core":
        import doran_core

        handle = doran_core.adapt(model, doran_core.DoranConfig(rank=4, **options))
        object.__setattr__(model, "doran_handle", handle)
        return model
    import peft

    if how.method == "hf":
        from doran_hf import DoranConfig

        return peft.get_peft_model(model, DoranConfig(rank=4, **options))  # type: ignore[arg-type]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options))  # type: ignore[arg-type]


def handle_of(model: nn.Module) -> Any:
    """doran-core's handle of :func:`adapted`'s model."""
    return model.doran_handle


def penalty_of(model: nn.Module) -> Tensor:
    """The penalty of whatever adapts the model."""
    if hasattr(model, "doran_handle"):
        return handle_of(model).penalty()  # type: ignore[no-any-return]
    from doran_hf import factor_penalty

    found = factor_penalty(model)
    assert found is not None
    return found


def batches(steps: int, rank: int | None, accumulate: int = 1) -> list[list[Tensor]]:
    """For each step its micro-batches of tokens: of one rank ``[2, 6]``, or with None of all ranks ``[4, 6]``."""
    generator = torch.Generator().manual_seed(7)
    whole = [[torch.randint(50, (4, 6), generator=generator) for _ in range(accumulate)] for _ in range(min(steps, 3))]
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return [[batch[rows].to(here()) for batch in whole[step % len(whole)]] for step in range(steps)]


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Next-token loss."""
    logits = model(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@dataclass
class Outcome:
    """What a training gave.

    Attributes:
        losses: of each step, of this process.
        tensors: the trained parameters at the end.
        logits: of a fixed batch at the end.
        start: of the same batch before.
    """

    losses: list[float]
    tensors: dict[str, Tensor]
    logits: Tensor
    start: Tensor


def train(
    how: Adaptation, options: Options, then: Callable[[Spread], Any] | None = None, make: Any = None
) -> Outcome | Any:
    """Train in this process's part of the group; `then` is called with the spread model, and its result returned."""
    rank = torch.distributed.get_rank() if options.strategy != "single" else None
    model = adapted(how) if make is None else make(how, options)
    spreading = spread(model, options, Block)
    try:
        start = probe(spreading)

        def loss(called: Any, tokens: Tensor) -> Tensor:
            value = loss_of(called, tokens)
            return value + penalty_of(spreading.inner) if options.penalty else value

        spreading.model.train()
        losses = [spreading.step(step, loss) for step in batches(options.steps, rank, options.accumulate)]
        if then is not None:
            return then(spreading)
        return Outcome(losses, spreading.tensors(), probe(spreading), start)
    finally:
        spreading.close()


@torch.no_grad()
def probe(spreading: Spread) -> Tensor:
    """Logits of a fixed batch, in evaluation, float32, on the CPU."""
    spreading.model.eval()
    tokens = batches(1, None)[0][0]
    cast = spreading.options.bf16 and spreading.options.strategy in ("single", "ddp")
    with torch.autocast(here().type, torch.bfloat16, enabled=cast):
        return spreading.model(tokens).float().cpu().clone()
