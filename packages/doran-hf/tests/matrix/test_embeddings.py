"""PEFT's tests around embeddings, tied heads and model cards, for DORAN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import logits, make_llama
from models import DECODERS, EmbConv1D, stir
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from doran_core import read_adapter
from doran_core.errors import BaseMismatchError, DoranError
from doran_hf import DoranConfig


def tied_llama() -> LlamaForCausalLM:
    model = make_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@pytest.mark.parametrize("save_embedding_layers", ["auto", True, False])
def test_saving_embedding_layers(save_embedding_layers: str | bool, tmp_path: Path) -> None:
    """test_save_pretrained_targeting_lora_to_embedding_layer."""
    model = get_peft_model(make_llama(), DoranConfig(target_modules=["embed_tokens", "q_proj"]))
    stir(model, "default")
    expected = logits(model)
    if save_embedding_layers == "auto":
        with pytest.warns(UserWarning, match="embedding layers"):
            model.save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
    else:
        model.save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert ("base_model.model.model.embed_tokens.base_layer.weight" in keys) == bool(save_embedding_layers)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path)), expected)


def test_a_resized_embedding_is_noticed(tmp_path: Path) -> None:
    """test_load_resized_embedding_ignore_mismatched_sizes."""
    get_peft_model(EmbConv1D(100), DoranConfig(target_modules=["emb", "lin0"])).save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match="made for the base weights"):
        PeftModel.from_pretrained(EmbConv1D(105), tmp_path)
    config = DoranConfig.from_pretrained(tmp_path)
    config.base_fingerprint = None
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(EmbConv1D(105), tmp_path, config=config)
    with pytest.warns(UserWarning, match="found shape .*100.* in the checkpoint and .*105"):
        model = PeftModel.from_pretrained(EmbConv1D(105), tmp_path, config=config, ignore_mismatched_sizes=True)
    assert model(torch.arange(90).reshape(10, 9)).isfinite().all()


def test_a_scaled_embedding() -> None:
    """test_lora_embed_scale_is_applied: Gemma's embedding multiplies its output by a constant."""
    case = DECODERS["gemma"]
    base = case.base()
    embedding = base.get_input_embeddings()
    assert float(embedding.embed_scale) != 1
    tokens = torch.tensor([[3, 5, 8]])
    expected = embedding(tokens)
    model = get_peft_model(base, DoranConfig(target_modules=["embed_tokens"]))
    layer = model.get_input_embeddings()
    assert torch.equal(layer(tokens), expected)
    stir(model, "default")
    adapter = layer.adapter("default")
    adapted = layer(tokens)
    wanted = adapter.merged_weight(embedding.weight.T).T[tokens] * float(embedding.embed_scale)
    torch.testing.assert_close(adapted, wanted.float(), atol=1e-5, rtol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(layer(tokens), adapted, atol=1e-5, rtol=1e-5)


def test_an_embedding_that_does_more_is_refused() -> None:
    class Shifted(torch.nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens) + 1

    model = make_llama()
    model.model.embed_tokens = Shifted(97, 32)
    with pytest.raises(ValueError, match="neither a lookup nor a lookup times embed_scale"):
        get_peft_model(model, DoranConfig(target_modules=["embed_tokens"]))


def test_a_tied_head_is_untied_by_its_own_adapter(tmp_path: Path) -> None:
    """test_merge_and_unload_fixes_tie_word_embeddings_config."""
    model = get_peft_model(tied_llama(), DoranConfig(target_modules=["embed_tokens"]))
    stir(model, "default")
    expected = logits(model)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-4, rtol=1e-4)


def test_similarly_named_modules_are_left_out(tmp_path: Path) -> None:
    """test_save_embedding_layers_excludes_similarly_named_sibling."""
    model = make_llama()
    model.model.embed_tokens_extra = torch.nn.Embedding(3, 3)
    get_peft_model(model, DoranConfig()).save_pretrained(tmp_path, save_embedding_layers=True)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.weight" in keys
    assert not any("extra" in key for key in keys)


@pytest.mark.parametrize("existing", [None, "---\nmeta: hello\n---\nThis is a model card\n"])
def test_model_cards(existing: str | None, tmp_path: Path) -> None:
    """test_existing_model_card, test_non_existing_model_card."""
    if existing is not None:
        (tmp_path / "README.md").write_text(existing)
    get_peft_model(make_llama(), DoranConfig()).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    if existing is not None:
        assert "meta: hello" in card
        assert "This is a model card" in card


def test_single_tokens_train_beside_the_adapter(tmp_path: Path) -> None:
    """test_*_trainable_token_indices: learned, saved, loaded and merged; doran_core refuses what it cannot merge."""
    model = get_peft_model(make_llama(), DoranConfig(trainable_token_indices=[5, 7]))
    before = model.get_input_embeddings()(torch.arange(10)).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = (model.get_input_embeddings()(torch.arange(10)) - before).abs().amax(1) > 0
    assert moved.nonzero()[:, 0].tolist() == [5, 7]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, adapter_name="other")
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(DoranError, match="trainable_token_indices"):
        read_adapter(tmp_path)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)
