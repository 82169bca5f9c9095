"""Tiny random models of many architectures, made of their configurations alone, with inputs for each.

A row names a class of transformers, the values that make its configuration tiny, the inputs, and what is adapted.
tiny.py has what the rows share.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny import (
    BART,
    GROUPED,
    IMAGE_TOKEN,
    SMALL,
    SPREAD,
    TEXT_PART,
    TOKENS,
    VISION,
    VOCABULARY,
    Family,
    Inputs,
    image_in_text,
    pixels,
    random_tokens,
    random_values,
    text,
    text_and_pixels,
    text_pairs,
)
from torch import Tensor


def _causal(name: str, inputs: Inputs = text, targets: str | list[str] = "all-linear", **values: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", SMALL | TOKENS | values, inputs, targets)


EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
HEADLESS = {"vision_use_head": False}
"""A vision tower without its pooling head, which the language model has no use for."""
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

DECODERS = {
    "llama": _causal("Llama", **GROUPED),
    "llama tied": _causal("Llama", **GROUPED, tie_word_embeddings=True),
    "mistral": _causal("Mistral", **GROUPED, sliding_window=None),
    "qwen2": _causal("Qwen2", **GROUPED, tie_word_embeddings=True),
    "qwen3": _causal("Qwen3", **GROUPED, head_dim=8),
    "gemma2": _causal("Gemma2", **GROUPED, head_dim=8),
    "gemma3 text": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT_PART, "head_dim": 8, "sliding_window": 4}, text
    ),
    "phi": _causal("Phi"),
    "phi3": _causal("Phi3", **GROUPED),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS,
         "initializer_range": SPREAD},
        text,
    ),
    "gpt_neo": _causal("GPTNeo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4),
    "gpt_neox": _causal("GPTNeoX"),
    "gptj": _causal("GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    "opt": _causal("OPT", ffn_dim=40, word_embed_proj_dim=32, init_std=SPREAD),
    "bloom": _causal("Bloom", n_layer=2, n_head=4),
    "falcon": _causal("Falcon"),
    "olmo2": _causal("Olmo2", **GROUPED),
    "cohere": _causal("Cohere", **GROUPED),
    "stablelm": _causal("StableLm", **GROUPED),
    "granite": _causal("Granite", **GROUPED),
    "xglm": _causal("XGLM", d_model=32, num_layers=2, attention_heads=4, ffn_dim=40, init_std=SPREAD),
    "smollm3": _causal("SmolLM3", **GROUPED),
}  # fmt: skip

EXPERT_MODELS = {
    "mixtral": _causal("Mixtral", **GROUPED, **EXPERTS),
    "qwen2_moe": _causal("Qwen2Moe", **GROUPED, **EXPERTS, shared_expert_intermediate_size=24),
    "qwen3_moe": _causal("Qwen3Moe", **GROUPED, **EXPERTS, head_dim=8),
    "olmoe": _causal("Olmoe", **GROUPED, **EXPERTS),
    "gpt_oss": _causal("GptOss", **GROUPED, **EXPERTS, head_dim=8, sliding_window=4),
    "deepseek_v3": _causal(
        "DeepseekV3", **EXPERTS, n_routed_experts=4, n_group=2, topk_group=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1, num_key_value_heads=4,
    ),
}  # fmt: skip

STATE_SPACE = {
    "mamba": _causal("Mamba", state_size=4, expand=2, conv_kernel=4, time_step_rank=4),
    "mamba2": _causal("Mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=4, expand=2),
    "falcon_mamba": _causal("FalconMamba", state_size=4, expand=2, conv_kernel=4, time_step_rank=4),
    "rwkv": _causal("Rwkv", attention_hidden_size=32, context_length=16),
    "recurrent_gemma": _causal(
        "RecurrentGemma", num_key_value_heads=1, head_dim=8, lru_width=32, attention_window_size=8,
        w_init_variance_scale=0.1, block_types=["recurrent", "attention"],
    ),
    "jamba": _causal(
        "Jamba", **GROUPED, num_experts=2, num_experts_per_tok=1, mamba_d_state=4, mamba_d_conv=4, mamba_expand=2,
        mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "bamba": _causal(
        "Bamba", **GROUPED, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4,
        attn_layer_indices=[1],
    ),
}  # fmt: skip

ENCODERS = {
    "bert": Family("BertForMaskedLM", "BertConfig", SMALL, text),
    "bert classifier": Family(
        "BertForSequenceClassification", "BertConfig", SMALL, text, options={"task_type": "SEQ_CLS"}
    ),
    "roberta": Family("RobertaForMaskedLM", "RobertaConfig", SMALL | {"pad_token_id": 0}, text),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40,
         "initializer_range": SPREAD},
        text,
    ),
    "distilbert classifier": Family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40,
         "initializer_range": SPREAD},
        text,
        options={"task_type": "SEQ_CLS"},
    ),
    "albert": Family("AlbertForMaskedLM", "AlbertConfig", SMALL | {"embedding_size": 16}, text),
    "electra": Family("ElectraForMaskedLM", "ElectraConfig", SMALL | {"embedding_size": 16}, text),
    "deberta": Family("DebertaForMaskedLM", "DebertaConfig", SMALL, text),
    "deberta_v2": Family("DebertaV2ForMaskedLM", "DebertaV2Config", SMALL, text),
    "modernbert": Family(
        "ModernBertForMaskedLM", "ModernBertConfig",
        SMALL | TOKENS | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4, "reference_compile": False}, text,
    ),
    "mpnet": Family("MPNetForMaskedLM", "MPNetConfig", SMALL, text),
    "xlnet": Family(
        "XLNetLMHeadModel", "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40,
         "initializer_range": SPREAD, "use_mems_eval": False}, text,
    ),
}  # fmt: skip

ENCODER_DECODERS = {
    "t5": Family("T5ForConditionalGeneration", "T5Config", T5, text_pairs),
    "umt5": Family("UMT5ForConditionalGeneration", "UMT5Config", T5 | TOKENS, text_pairs),
    "bart": Family("BartForConditionalGeneration", "BartConfig", BART, text_pairs),
    "mbart": Family("MBartForConditionalGeneration", "MBartConfig", BART, text_pairs),
    "pegasus": Family("PegasusForConditionalGeneration", "PegasusConfig", BART, text_pairs),
    "marian": Family("MarianMTModel", "MarianConfig", BART, text_pairs),
    "m2m_100": Family("M2M100ForConditionalGeneration", "M2M100Config", BART, text_pairs),
    "blenderbot": Family("BlenderbotForConditionalGeneration", "BlenderbotConfig", BART, text_pairs),
}

IMAGE_MODELS = {
    "vit": Family("ViTForImageClassification", "ViTConfig", VISION, pixels(16)),
    "deit": Family("DeiTForImageClassification", "DeiTConfig", VISION, pixels(16)),
    "beit": Family("BeitForImageClassification", "BeitConfig", VISION, pixels(16)),
    "dinov2": Family("Dinov2ForImageClassification", "Dinov2Config", VISION | {"mlp_ratio": 1}, pixels(16)),
    "swin": Family(
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
         "initializer_range": SPREAD}, pixels(16),
    ),
    "segformer": Family(
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
         "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
         "decoder_hidden_size": 16, "initializer_range": SPREAD}, pixels(16),
    ),
    "resnet": Family(
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, pixels(32),
        ["convolution"],
    ),
    "convnext": Family(
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "initializer_range": SPREAD},
        pixels(16),
    ),
}  # fmt: skip

_CLIP_TEXT = SMALL | TOKENS | {"eos_token_id": 60}


def _qwen_pixels() -> dict[str, Tensor]:
    """Two images of 4 x 4 patches in transformers' flat form: 4 tokens for each image after merging."""
    return {
        "pixel_values": random_values(32, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]] * 2),
    }


_QWEN_TEXT = TEXT_PART | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}

VISION_LANGUAGE = {
    "clip": Family(
        "CLIPModel", "CLIPConfig",
        {"text_config": _CLIP_TEXT, "vision_config": VISION, "projection_dim": 16}, text_and_pixels(16),
    ),
    "siglip": Family(
        "SiglipModel", "SiglipConfig",
        {"text_config": SMALL | {"projection_size": 32}, "vision_config": VISION}, text_and_pixels(16),
    ),
    "llava": Family(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {"model_type": "llama", **TEXT_PART},
         "vision_config": {"model_type": "clip_vision_model", **VISION},
         "image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1},
        image_in_text(4, pixels(16)),
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {"text_config": _QWEN_TEXT, "image_token_id": IMAGE_TOKEN, "vision_start_token_id": 3, "video_token_id": 59,
         "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 1, "patch_size": 4,
                           "hidden_size": 32, "spatial_merge_size": 2}},
        image_in_text(4, _qwen_pixels),
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"text_config": _QWEN_TEXT, "image_token_id": IMAGE_TOKEN, "vision_start_token_id": 3, "video_token_id": 59,
         "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 40, "patch_size": 4,
                           "out_hidden_size": 32, "spatial_merge_size": 2, "window_size": 16,
                           "fullatt_block_indexes": [1]}},
        image_in_text(4, _qwen_pixels),
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": TEXT_PART | {"head_dim": 8}, "vision_config": VISION | HEADLESS, "mm_tokens_per_image": 4,
         "image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN, "boi_token_index": 3, "eoi_token_index": 59},
        image_in_text(4, lambda: pixels(16)() | {"token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]] * 2)}),
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
        {"text_config": {"model_type": "gemma", **TEXT_PART, "head_dim": 8},
         "vision_config": {"model_type": "siglip_vision_model", **VISION, **HEADLESS}, "projection_dim": 32,
         "image_token_index": IMAGE_TOKEN},
        image_in_text(4, pixels(16)),
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration", "SmolVLMConfig",
        {"text_config": {"model_type": "llama", **TEXT_PART}, "vision_config": VISION, "scale_factor": 2,
         "image_token_id": IMAGE_TOKEN},
        image_in_text(1, lambda: {"pixel_values": random_values(2, 1, 3, 16, 16)}),
    ),
}  # fmt: skip

_WAVE: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "initializer_range": SPREAD, "layerdrop": 0.0,
    "apply_spec_augment": False,
}  # fmt: skip

SPEECH = {
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        BART | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        lambda: {"input_features": random_values(2, 8, 16), "decoder_input_ids": random_tokens(2, 4)},
    ),
    "wav2vec2": Family("Wav2Vec2ForCTC", "Wav2Vec2Config", _WAVE, lambda: {"input_values": random_values(2, 200)}),
    "hubert": Family("HubertForCTC", "HubertConfig", _WAVE, lambda: {"input_values": random_values(2, 200)}),
    "speech_to_text": Family(
        "Speech2TextForConditionalGeneration", "Speech2TextConfig",
        BART | {"input_feat_per_channel": 8, "max_source_positions": 32, "max_target_positions": 16,
                "conv_channels": 16, "num_conv_layers": 1, "conv_kernel_sizes": (3,)},
        lambda: {"input_features": random_values(2, 12, 8), "decoder_input_ids": random_tokens(2, 4)},
    ),
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    **DECODERS,
    **EXPERT_MODELS,
    **STATE_SPACE,
    **ENCODERS,
    **ENCODER_DECODERS,
    **IMAGE_MODELS,
    **VISION_LANGUAGE,
    **SPEECH,
}
