"""torch.compile: one graph, the same numbers forward and backward, for every kind of adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import MAKERS, disturb, make_inputs, make_llama
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from doran_hf import DoranConfig

OPTIONS: list[dict[str, Any]] = [
    {},
    {"target_modules": "all-linear", "factors": "static", "tau_granularity": "row"},
    {"target_modules": "all-linear", "sharing": "model", "share_output": True},
    {"tau_kind": "zero", "norm_grad": "detached", "experts": True},
    {"norm_method": "direct"},
]


def one_block() -> LlamaForCausalLM:
    """Compiling takes its time, layer by layer."""
    model = make_llama()
    model.model.layers = model.model.layers[:1]
    return model


def run(model: nn.Module, family: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(**make_inputs(family)).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_graph_and_the_same_numbers(options: dict[str, Any]) -> None:
    check("llama", options)


@pytest.mark.parametrize("family", sorted(set(MAKERS) - {"llama"}))
def test_other_families(family: str) -> None:
    check(family, {"target_modules": "all-linear"})


def check(family: str, options: dict[str, Any]) -> None:
    base = one_block() if family == "llama" else MAKERS[family]()
    model = get_peft_model(base, DoranConfig(**options)).eval()  # no dropout, which the base models have
    disturb(model)
    expected, gradients = run(copy.deepcopy(model), family)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend="aot_eager")  # raises at a graph break
    for _ in range(2):
        found, found_gradients = run(compiled, family)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, atol=1e-6, rtol=1e-4)


def test_inductor_gives_the_same_numbers() -> None:
    """The default backend, which makes code of it: one graph, forward and backward, with the penalty in the loss."""
    model = get_peft_model(one_block(), DoranConfig(factor_penalty=0.5)).train()
    disturb(model)
    ids = make_inputs("llama")["input_ids"]

    def loss_and_gradients(module: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [p.grad for p in module.parameters() if p.requires_grad and p.grad is not None]

    expected, gradients = loss_and_gradients(copy.deepcopy(model))
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True)
    found, found_gradients = loss_and_gradients(compiled)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(found_gradients) == len(gradients) > 0
    for gradient, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-3)


def test_training_with_the_penalty_and_labels_is_one_graph() -> None:
    model = get_peft_model(one_block(), DoranConfig(factor_penalty=0.5)).train()
    disturb(model)
    ids = make_inputs("llama")["input_ids"]
    expected = model(input_ids=ids, labels=ids).loss
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids, labels=ids).loss, expected)


def test_the_masks_and_noise_are_drawn_anew_in_every_pass() -> None:
    options = {"tau_kind": "gaussian", "experts": True, "expert_mask": "expert", "expert_dropout": 0.5, "dropout": 0.2}
    model = get_peft_model(one_block(), DoranConfig(**options)).train()
    disturb(model)
    model.compile(fullgraph=True, backend="aot_eager")
    first, second = (model(**make_inputs("llama")).logits for _ in range(2))
    assert not torch.allclose(first, second)
