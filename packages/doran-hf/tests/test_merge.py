"""Merging into the base weights and taking it back."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import MAKERS, disturb, logits, make_llama
from peft import get_peft_model

from doran_core.errors import NonFiniteError
from doran_hf import DoranConfig
from doran_hf.layer import DoranLayer, doran_layers


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_merged_gives_the_same_logits_and_unmerged_the_same_bits(family: str, targets: str | None) -> None:
    base = MAKERS[family]()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, DoranConfig(target_modules=targets, tau_granularity="row"))
    disturb(model)
    adapted = logits(model, family)
    model.merge_adapter(safe_merge=True)
    assert (logits(model, family) - adapted).abs().max() < 1e-4
    model.unmerge_adapter()
    assert torch.equal(logits(model, family), adapted)
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unload_returns_a_plain_model(dtype: torch.dtype) -> None:
    model = get_peft_model(make_llama(dtype), DoranConfig(target_modules="all-linear"))
    disturb(model)
    adapted = logits(model).float()
    expected = {
        layer.name: layer.adapter("default").merged_weight(layer.view.weight()) for layer in doran_layers(model)
    }
    merged = model.merge_and_unload()
    for name, weight in expected.items():
        assert torch.equal(merged.get_submodule(name).weight, weight.to(dtype))  # rounded once
    assert not any(isinstance(module, DoranLayer) for module in merged.modules())
    assert all(parameter.dtype == dtype for parameter in merged.parameters())
    assert (logits(merged).float() - adapted).abs().max() < (1e-4 if dtype == torch.float32 else 0.2)


def test_embedding_merges() -> None:
    model = get_peft_model(make_llama(), DoranConfig(target_modules=["embed_tokens"]))
    disturb(model)
    adapted = logits(model)
    assert (logits(model.merge_and_unload()) - adapted).abs().max() < 1e-4


def test_merging_one_by_one_is_merging_together() -> None:
    model = get_peft_model(make_llama(), DoranConfig())
    model.add_adapter("second", DoranConfig(rank=2))
    disturb(model, "default")
    disturb(model, "second", seed=6)
    base = {layer.name: layer.original_weight().clone() for layer in doran_layers(model)}
    model.merge_adapter(["default", "second"])
    together = {layer.name: layer.get_base_layer().weight.clone() for layer in doran_layers(model)}
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    for layer in doran_layers(model):
        assert torch.equal(layer.get_base_layer().weight, together[layer.name])
    model.unmerge_adapter()
    for layer in doran_layers(model):
        assert torch.equal(layer.get_base_layer().weight, base[layer.name])


def test_safe_merge_refuses_nan_and_leaves_the_weight() -> None:
    model = get_peft_model(make_llama(), DoranConfig())
    base = logits(make_llama())
    layer = next(doran_layers(model))
    with torch.no_grad():
        layer.adapter("default").magnitude[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.q_proj"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_a_tied_head_merges_for_itself_and_stays_untied_on_disk(targets, tmp_path):
    """The embedding keeps its own weight, in memory and after saving and loading the merged model."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).eval()
    model = get_peft_model(base, DoranConfig(rank=2, target_modules=targets)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "doran_adapter" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tokens = torch.randint(0, 64, (2, 7))
    expected = model(tokens).logits
    model.merge_adapter()
    assert torch.allclose(model(tokens).logits, expected, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(tokens).logits, expected)
    assert base.lm_head.weight is base.get_input_embeddings().weight
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(again(tokens).logits, expected, atol=1e-4)
