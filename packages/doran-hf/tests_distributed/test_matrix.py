"""Every way of spreading a model, with two processes against one, and beside PEFT's LoRA in half precision."""

from __future__ import annotations

import functools

import pytest
import torch
from models import Adaptation, Outcome, train
from processes import Pair
from strategies import STRATEGIES, Options

EXACT = 1e-5
"""What float32's other order of sums may change in ten steps: losses, and trained parameters."""


@functools.cache
def alone(how: tuple[str, str], steps: int = 10, accumulate: int = 1, penalty: bool = False) -> Outcome:
    """One process, float32: the same batches at once."""
    method, factors = how
    options = {} if method == "lora" else {"factors": factors}
    return train(Adaptation(method, options), Options(steps=steps, accumulate=accumulate, penalty=penalty))


def mean_losses(outcomes: list[Outcome]) -> torch.Tensor:
    return torch.tensor([outcome.losses for outcome in outcomes], dtype=torch.float64).mean(0)


def distances(outcomes: list[Outcome], one: Outcome) -> tuple[float, float, float]:
    """Largest differences of losses, of trained parameters and of logits at the end."""
    losses = (mean_losses(outcomes) - torch.tensor(one.losses, dtype=torch.float64)).abs().max()
    tensors = max(float((outcomes[0].tensors[name] - one.tensors[name]).abs().max()) for name in one.tensors)
    return float(losses), tensors, float((outcomes[0].logits - one.logits).abs().max())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["core", "hf"])
@pytest.mark.parametrize("factors", ["generated", "static"])
def test_float32_is_one_process(pair: Pair, strategy: str, method: str, factors: str) -> None:
    one = alone((method, factors))
    outcomes = pair.run(train, Adaptation(method, {"factors": factors}), Options(strategy))
    losses, tensors, logits = distances(outcomes, one)
    assert (losses < EXACT, tensors < EXACT, logits < EXACT) == (True, True, True), (losses, tensors, logits)
    assert torch.equal(outcomes[0].start, one.start)  # an adapter that was just made is the base model
    assert max(abs(a - b) for a, b in zip(one.losses, one.losses[1:], strict=False)) > 1e-2  # it does train


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["core", "hf"])
def test_bf16_is_as_near_as_lora(pair: Pair, strategy: str, method: str) -> None:
    """To one process in float32, in the loss of every step; LoRA under the same policy is the yardstick."""
    lora = distances(pair.run(train, Adaptation("lora"), Options(strategy, bf16=True)), alone(("lora", "")))
    ours = distances(
        pair.run(train, Adaptation(method, {"factors": "generated"}), Options(strategy, bf16=True)),
        alone((method, "generated")),
    )
    assert lora[0] > 1e-5  # half precision it was
    assert ours[0] <= 2.0 * lora[0], (ours, lora)
    assert ours[2] <= 2.0 * lora[2], (ours, lora)
