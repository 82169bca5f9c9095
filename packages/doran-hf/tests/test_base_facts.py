"""What saved adapters record of their base, and doran_core's table of it, held against the installed transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_bert, make_llama, make_vit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaForCausalLM,
)

from doran_core.adapter import read_adapter
from doran_core.checkpoint.architectures import known_ties, stored_candidates
from doran_core.errors import AdapterFormatError
from doran_core.merge import merge_checkpoint
from doran_hf import DoranConfig
from doran_hf.renaming import stored_name

ARCHITECTURES = {
    "BertForMaskedLM": "bert",
    "RobertaForMaskedLM": "roberta",
    "ModernBertForMaskedLM": "modernbert",
    "DistilBertForMaskedLM": "distilbert",
    "MambaForCausalLM": "mamba",
    "WhisperForConditionalGeneration": "whisper",
    "T5ForConditionalGeneration": "t5",
    "BartForConditionalGeneration": "bart",
    "LlamaForCausalLM": "llama",
    "GPT2LMHeadModel": "gpt2",
    "GemmaForCausalLM": "gemma",
    "ViTForImageClassification": "vit",
    "DeiTForImageClassification": "deit",
    "BeitForImageClassification": "beit",
    "Dinov2ForImageClassification": "dinov2",
    "SwinForImageClassification": "swin",
    "SegformerForImageClassification": "segformer",
    "LlavaForConditionalGeneration": "llava",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Gemma3ForConditionalGeneration": "gemma3",
}


@pytest.mark.parametrize(("architecture", "model_type"), ARCHITECTURES.items())
def test_the_table_is_what_transformers_does(architecture: str, model_type: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type]()
    config.tie_word_embeddings = True
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    facts = {"architectures": [architecture], "tie_word_embeddings": True}
    assert known_ties(facts) == model.all_tied_weights_keys
    default = bool(getattr(transformers.CONFIG_MAPPING[model_type](), "tie_word_embeddings", False))
    assert (known_ties({"architectures": [architecture]}) != {}) == (default and bool(model.all_tied_weights_keys))
    for name, parameter in model.named_parameters():
        stored = stored_name(model, name)
        if parameter.dim() > 1 and stored is not None:
            assert [*stored_candidates(facts, name), name][0] == stored


def tied_llama() -> LlamaForCausalLM:
    config = make_llama().config
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config).eval()


def test_ties_are_recorded(tmp_path: Path) -> None:
    get_peft_model(tied_llama(), DoranConfig()).save_pretrained(tmp_path)
    record = read_adapter(tmp_path)
    assert record.ties == {"lm_head.weight": "model.embed_tokens.weight"}  # type: ignore[union-attr]
    assert record.stored_names == {}  # type: ignore[union-attr]


def test_ties_are_recorded_while_an_end_is_adapted_and_merged(tmp_path: Path) -> None:
    model = get_peft_model(tied_llama(), DoranConfig(target_modules=["lm_head"]))
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert read_adapter(tmp_path).ties == {"lm_head.weight": "model.embed_tokens.weight"}  # type: ignore[union-attr]


def test_stored_names_are_recorded_and_found_without_the_table(tmp_path: Path) -> None:
    make_vit().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, DoranConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    names = read_adapter(tmp_path / "adapter").stored_names  # type: ignore[union-attr]
    key = "vit.layers.0.attention.q_proj.weight"
    assert names[key] == "vit.encoder.layer.0.attention.attention.query.weight"
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["NobodysModel"]}))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    config = tmp_path / "merged" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["ViTForImageClassification"]}))
    pixels = torch.randn(2, 1, 8, 8)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(merged(pixels).logits, model.eval()(pixels).logits, atol=1e-5)


def test_a_base_compiled_before_adapting(tmp_path: Path) -> None:
    plain = get_peft_model(make_llama(), DoranConfig())
    compiled = get_peft_model(torch.compile(make_llama(), backend="eager"), DoranConfig())
    plain.save_pretrained(tmp_path / "plain")
    compiled.save_pretrained(tmp_path / "folded")
    one, other = (read_adapter(tmp_path / name) for name in ("plain", "folded"))
    assert one.modules.keys() == other.modules.keys()
    assert one.base_fingerprint == other.base_fingerprint  # type: ignore[union-attr]
    PeftModel.from_pretrained(torch.compile(make_llama(), backend="eager"), tmp_path / "plain")
    PeftModel.from_pretrained(make_llama(), tmp_path / "folded")


def test_a_head_that_is_tied_with_its_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=24,
    )  # fmt: skip
    base = BertForMaskedLM(config).eval()
    torch.nn.init.normal_(base.cls.predictions.bias)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, DoranConfig(target_modules=["word_embeddings"], rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    tokens = torch.arange(12)[None]
    merged = BertForMaskedLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, model.eval()(tokens).logits, atol=1e-5)


def test_bert_is_not_renamed() -> None:
    model = make_bert()
    assert all(stored_name(model, name) in (name, None) for name, _ in model.named_parameters())


def moved(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("config", [DoranConfig, LoraConfig])
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_saved_in_full(config: type, tied: bool, tmp_path: Path) -> None:
    base = tied_llama() if tied else make_llama()
    base.resize_token_embeddings(base.config.vocab_size + 7, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    saved = ["embed_tokens", "lm_head"]
    model = moved(get_peft_model(base, config(target_modules=["q_proj"], modules_to_save=saved)))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()(tokens).logits
        assert torch.allclose(merged, model(tokens).logits, atol=1e-5)


def test_modules_to_save_by_the_end_of_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 1, "vocab_size": 40, "max_position_embeddings": 24}
    DistilBertForSequenceClassification(DistilBertConfig(**sizes)).save_pretrained(tmp_path / "base")
    base = DistilBertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = moved(get_peft_model(base, DoranConfig(task_type="SEQ_CLS", target_modules=["q_lin"])))
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = DistilBertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, model(input_ids=tokens).logits, atol=1e-5)


@pytest.mark.parametrize("config", [DoranConfig, LoraConfig])
def test_single_trained_tokens_are_refused_with_what_to_do(config: type, tmp_path: Path) -> None:
    get_peft_model(make_llama(), config(target_modules=["q_proj"], trainable_token_indices=[1])).save_pretrained(
        tmp_path
    )
    with pytest.raises(AdapterFormatError, match="load it with PEFT, call merge_and_unload"):
        read_adapter(tmp_path)
