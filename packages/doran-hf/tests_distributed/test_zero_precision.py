"""ZeRO in half precision: what DeepSpeed's bf16 rounds, and the setting that rounds nothing of the adapter."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from devices import here
from models import Adaptation, Outcome, adapted, loss_of, probe, train
from processes import Pair
from strategies import Options, Spread
from test_matrix import ROUNDING, alone, relative_distances

from doran_core.layers import DoranAdapter

STAGES = ("zero2", "zero3")
METHODS = {
    "core": Adaptation("core"),
    "hf": Adaptation("hf"),
    "lora": Adaptation("lora"),
    "dora": Adaptation("lora", {"use_dora": True}),
}


def bfloat16_base(how: Adaptation, options: Options) -> torch.nn.Module:
    return adapted(how, torch.bfloat16)


def optimizer_start(how: Adaptation, bf16: bool, stage: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the optimizer starts from in float32, and what the adapter was made with."""
    from deepspeed.utils import safe_get_full_fp32_param

    made: dict[str, torch.Tensor] = {}

    def make(how: Adaptation, options: Options) -> torch.nn.Module:
        model = adapted(how) if bf16 else bfloat16_base(how, options)
        made.update({name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad})
        return model

    def read(spreading: Spread) -> dict[str, torch.Tensor]:
        model = spreading.inner
        return {n: safe_get_full_fp32_param(p).cpu().clone() for n, p in model.named_parameters() if p.requires_grad}

    return train(how, Options(stage, bf16=bf16, steps=0), read, make), made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeeds_bf16_rounds_what_the_optimizer_starts_from(pair: Pair, stage: str, method: str) -> None:
    """This is DeepSpeed's doing with every adapter; docs/howto/scaling.md advises against it because of this."""
    for start, made in pair.run(optimizer_start, METHODS[method], True, stage):
        assert all(torch.equal(start[name].view_as(value), value.bfloat16().float()) for name, value in made.items())
        assert any(not torch.equal(start[name].view_as(value), value) for name, value in made.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_without_it_the_optimizer_starts_from_the_adapter(pair: Pair, stage: str, method: str) -> None:
    for start, made in pair.run(optimizer_start, METHODS[method], False, stage):
        assert all(torch.equal(start[name].view_as(value), value.float()) for name, value in made.items())


def half_precision(how: Adaptation, stage: str) -> Outcome:
    """Train a bfloat16 base, its adapter in float32."""
    outcome = train(how, Options(stage), None, bfloat16_base)
    assert isinstance(outcome, Outcome)
    return dataclasses.replace(outcome, start=outcome.start.float(), logits=outcome.logits.float())


@pytest.mark.parametrize("method", ["core", "hf"])
def test_a_bfloat16_base_under_zero_is_as_near_as_lora(pair: Pair, method: str) -> None:

    def distances(method: str, factors: str) -> list[float]:
        """Of the logits. The losses are of rounded logits, and LoRA's differ by 1.7 times between runs."""
        one = alone((method, factors))
        return [relative_distances(pair.run(half_precision, METHODS[method], stage), one)[1] for stage in STAGES]

    for ours, lora in zip(distances(method, "generated"), distances("lora", ""), strict=True):
        assert 1e-3 < ours <= ROUNDING * lora, (ours, lora)


def warned(how: Adaptation, bf16: bool, stage: str) -> tuple[list[str], set[torch.dtype]]:
    """Warnings of two passes, and the precisions of the magnitudes in them."""
    seen: set[torch.dtype] = set()

    def run(spreading: Spread) -> list[str]:
        for module in spreading.inner.modules():
            if isinstance(module, DoranAdapter):
                module.register_forward_pre_hook(lambda adapter, args: seen.add(adapter.magnitude.dtype))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            loss_of(spreading.model, torch.arange(12, device=here()).view(2, 6))
            probe(spreading)
        return [str(warning.message) for warning in caught if "DeepSpeed" in str(warning.message)]

    return train(how, Options(stage, bf16=bf16, steps=0), run, None if bf16 else bfloat16_base), seen


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", ["core", "hf"])
def test_a_rounded_adapter_is_named(pair: Pair, stage: str, method: str) -> None:
    for messages, precisions in pair.run(warned, METHODS[method], True, stage):
        assert precisions == {torch.bfloat16}
        assert len(set(messages)) == 1
        assert "load the base model in bfloat16" in messages[0]
    assert pair.run(warned, METHODS[method], False, stage) == [([], {torch.float32})] * 2
