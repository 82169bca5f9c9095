"""The formula of docs/howto/scaling.md for what each process holds, at one point: FSDP2, two processes."""

from __future__ import annotations

from typing import Any

import torch
from models import TARGETS, WIDTH, Adaptation, Model, batches, loss_of, train
from processes import Pair
from strategies import Options, Spread

RANK = 4  # of models.adapted
EMBEDDING = 16


def trained_parameters(layers: list[tuple[int, int]], blocks: int) -> int:
    """``r (d_in + d_out) + d_out + 1`` for each layer of a block, and ``4 e r`` for the block's networks."""
    block = sum(RANK * (d_in + d_out) + d_out + 1 for d_in, d_out in layers)
    return blocks * (block + 4 * EMBEDDING * RANK)


def held(spreading: Spread) -> tuple[int, int]:
    """Bytes of parameters, gradients and Adam's moments that lie in this process, between two steps."""
    loss_of(spreading.model, batches(1, torch.distributed.get_rank())[0][0]).backward()

    def local(tensor: Any) -> int:
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return int(part.numel() * part.element_size())

    states = spreading.optimizer.state.values() if spreading.optimizer is not None else ()
    moments = sum(local(state[name]) for state in states for name in ("exp_avg", "exp_avg_sq"))
    gradients = sum(local(p.grad) for p in spreading.model.parameters() if p.grad is not None)
    return sum(local(p) for p in spreading.model.parameters()), gradients + moments


def test_what_a_process_holds(pair: Pair) -> None:
    found = pair.run(train, Adaptation("hf"), Options("fsdp2", steps=1), held)
    layers = [(WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)]
    assert len(layers) == len(TARGETS)
    trained, base = trained_parameters(layers, blocks=2), sum(p.numel() for p in Model().parameters())
    assert sum(parameters for parameters, _ in found) == 4 * (base + trained)  # the base is float32 here
    assert sum(others for _, others in found) == 12 * trained
    for parameters, others in found:
        assert parameters < 0.55 * 4 * (base + trained)
        assert others < 0.55 * 12 * trained
