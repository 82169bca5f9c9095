"""Every way of spreading a model, with two processes against one, and beside PEFT's LoRA in half precision."""

from __future__ import annotations

import functools

import pytest
import torch
from devices import ON_GPUS
from models import Adaptation, Outcome, batches, train
from processes import Pair
from strategies import STRATEGIES, Options

EXACT = 1e-5
"""What float32's other order of sums may change in ten steps: losses, and trained parameters."""

ROUNDING = 1.25
"""Half precision: so many times LoRA's distance; what is rounded differs, and ten losses are few to take a mean of."""


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
    # An adapter that was just made is the base model. A GPU's products differ with where ZeRO-3's weights lie.
    torch.testing.assert_close(outcomes[0].start, one.start, atol=1e-6 if ON_GPUS else 0.0, rtol=0.0)
    assert max(abs(a - b) for a, b in zip(one.losses, one.losses[1:], strict=False)) > 1e-2  # it does train


def relative_distances(outcomes: list[Outcome], one: Outcome) -> tuple[float, float]:
    """Distances of losses and of logits to one process, over what the training has changed.

    The change is computed in half precision, too, and DoRAN's is larger than LoRA's after as many steps.
    """
    rounds = len({tuple(batch[0].flatten().tolist()) for batch in batches(len(one.losses), None)})
    exact = torch.tensor(one.losses, dtype=torch.float64)
    fall = (exact[rounds:] - exact[torch.arange(rounds, len(exact)) % rounds]).square().mean().sqrt()
    losses = (mean_losses(outcomes) - exact).square().mean().sqrt() / fall
    logits = (outcomes[0].logits - one.logits).norm() / (one.logits - one.start).norm()
    return float(losses), float(logits)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["core", "hf"])
def test_bf16_is_as_near_as_lora(pair: Pair, strategy: str, method: str) -> None:
    """To one process in float32; LoRA under the same policy is the yardstick."""
    options, how = Options(strategy, bf16=True), Adaptation(method, {"factors": "generated"})
    lora = relative_distances(pair.run(train, Adaptation("lora"), options), alone(("lora", "")))
    ours = relative_distances(pair.run(train, how, options), alone((method, "generated")))
    assert min(lora) > 1e-3  # half precision it was
    assert (ours[0] <= ROUNDING * lora[0], ours[1] <= ROUNDING * lora[1]) == (True, True), (ours, lora)
