"""Weight sides of PEFT models: computed together from every entrance, kept in generation, several adapters."""

import importlib

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from doran_core.kernels import use_backend
from doran_hf import DoranConfig

IDS = torch.tensor([[1, 5, 9, 3, 7], [2, 8, 4, 6, 11]])


def make(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, eos_token_id=49, pad_token_id=0,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), DoranConfig(rank=4, target_modules="all-linear", **options))
    return shift(model)


def shift(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "doran_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def alone(monkeypatch):
    """Calls in which a layer computed its weight side by itself."""
    calls = []
    module = importlib.import_module("doran_core.kernels.prepare")
    compute = module.compute_alone
    monkeypatch.setattr(module, "compute_alone", lambda *args: calls.append(1) or compute(*args))
    return calls


def gradients(model, call, backend):
    model.zero_grad()
    with use_backend(backend):
        call(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, right):
    assert ours.keys() == right.keys()
    for name, grad in right.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_every_entrance_computes_them_together(alone):
    model = make()
    right = gradients(model, model, "reference")
    for call in (model, model.base_model, model.base_model.model, model.get_base_model()):
        assert_same(gradients(model, call, "torch"), right)
    assert not alone
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(gradients(model, model, "torch"), right)
    assert not alone


def test_generation_keeps_them_until_the_next_step(alone):
    model = make().eval()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with use_backend("torch"):
        first = model.generate(input_ids=IDS, **options)
        assert len(alone) == 14  # once for each layer, not once for each token
        assert torch.equal(model.generate(input_ids=IDS, **options), first)
        assert len(alone) == 14
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.2, fused=True)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        ours = model(input_ids=IDS).logits
        with torch.no_grad():
            kept = model(input_ids=IDS).logits
    with use_backend("reference"), torch.no_grad():
        right = model(input_ids=IDS).logits
    torch.testing.assert_close(kept, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.detach(), right, rtol=1e-4, atol=1e-5)


def test_several_adapters_and_rows_of_a_batch():
    model = make()
    model.add_adapter("other", DoranConfig(rank=2, target_modules=["q_proj", "up_proj"], tau_kind="zero"))
    shift(model).eval()
    mask = torch.ones_like(IDS)
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        found = []
        for backend in ("reference", "torch", "torch"):
            with use_backend(backend), torch.no_grad():
                found.append(model(input_ids=IDS, attention_mask=mask).logits)
        for each in found[1:]:
            torch.testing.assert_close(each, found[0], rtol=1e-4, atol=1e-5)
        assert_same(gradients(model, model, "torch"), gradients(model, model, "reference"))
    rows = {"adapter_names": ["other", "__base__"]}
    found = []
    for backend in ("reference", "torch", "torch"):
        with use_backend(backend), torch.no_grad():
            found.append(model(input_ids=IDS, attention_mask=mask, **rows).logits)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-4, atol=1e-5)


def test_merged_disabled_and_unloaded():
    model = make().eval()
    with torch.no_grad():
        right = model(input_ids=IDS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, right, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=IDS).logits, right)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=IDS).logits, right)
        assert torch.equal(model(input_ids=IDS).logits, right)
    base = model.unload()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())
