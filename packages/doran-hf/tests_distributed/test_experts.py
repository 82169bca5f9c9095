"""Adapters of stacked experts and routers over two processes: right as one process is, or refused by a named error."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import here
from peft import get_peft_model
from processes import Pair, RemoteError
from strategies import Options, spread
from test_matrix import EXACT
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralExperts

from doran_hf import DoranConfig

STEPS = 4


def adapted(factors: str, targets: tuple[str, ...]) -> nn.Module:
    torch.manual_seed(0)
    base = MixtralForCausalLM._from_config(
        MixtralConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        ),
        experts_implementation="eager",
    ).to(here())  # fmt: skip
    for name, parameter in base.named_parameters():
        if "experts" in name or "gate" in name:
            nn.init.normal_(parameter, std=0.2)
    config = DoranConfig(
        rank=2,
        factors=factors,
        target_modules=["q_proj", *targets],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    return get_peft_model(base, config)  # type: ignore[arg-type]


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(
    options: Options,
    factors: str,
    block: type[nn.Module] = MixtralDecoderLayer,
    targets: tuple[str, ...] = ("gate",),
) -> Any:
    """The losses of this process's rows, and the trained parameters."""
    tokens = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(7)).to(here())
    rank = torch.distributed.get_rank() if options.strategy != "single" else None
    rows = tokens if rank is None else tokens[2 * rank : 2 * rank + 2]
    spreading = spread(adapted(factors, targets), options, block)
    try:
        losses = [spreading.step([rows], loss_of) for _ in range(STEPS)]
        return losses, spreading.tensors()
    finally:
        spreading.close()


@functools.cache
def alone(factors: str) -> Any:
    return train(Options(), factors)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "zero2"])
@pytest.mark.parametrize("factors", ["generated", "static"])
def test_two_processes_train_as_one_does(pair: Pair, strategy: str, factors: str) -> None:
    losses, tensors = alone(factors)
    found = pair.run(train, Options(strategy), factors)
    mean = torch.tensor([part[0] for part in found]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses), rtol=0, atol=EXACT)
    assert found[0][1].keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[0][1][name], tensor, rtol=0, atol=EXACT, msg=name)
    assert losses[0] - losses[-1] > 1e-2  # it does train


@pytest.mark.parametrize(
    ("strategy", "targets", "named"),
    [
        ("fsdp2", (), r"layers\.0\.mlp\.experts\.\w+: its weight"),
        ("zero3", (), r"layers\.0\.mlp\.experts\.\w+: its weight"),
        ("zero3", ("gate",), "MixtralTopKRouter: a router's weight"),
    ],
    ids=["fsdp2-experts", "zero3-experts", "zero3-router"],
)
def test_weights_that_are_whole_in_their_own_forward_alone_are_refused(
    pair: Pair, strategy: str, targets: tuple[str, ...], named: str
) -> None:
    with pytest.raises(RemoteError, match=rf"{named} is whole only inside its .*own forward") as caught:
        pair.run(train, Options(strategy), "static", MixtralExperts, targets)
    assert caught.value.kind == "TargetError"
