"""Base models for the tests: tiny Llama, Qwen2 (with biases), Gemma, `towers`; and Hugging Face's answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapter_specs import AdapterSpec
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from towers import TOWERS, build
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
)

_TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_tiny(kind: str, folder: Path) -> Path:
    """Write a random float32 checkpoint of `kind` ("llama", "qwen2", "gemma", or one of `towers.TOWERS`).

    Its biases are not zero.
    """
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaConfig(**_TINY),
        "qwen2": lambda: Qwen2Config(**_TINY),
        "gemma": lambda: GemmaConfig(**_TINY | {"head_dim": 64, "tie_word_embeddings": True}),
    }
    torch.manual_seed(7)
    model = build(kind) if kind in TOWERS else AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.save_pretrained(folder)
    return folder


def put_weights(model: nn.Module, weights: dict[str, Tensor], adapter: AdapterSpec | None) -> None:
    """Make a model the checkpoint with `adapter` merged (None: the base), rounded once from float64 to its dtype."""
    for name, weight in weights.items():
        merged = adapter.merged(name) if adapter is not None and name in adapter.layers else weight
        model.get_submodule(name).weight.data.copy_(merged)


def build_quantized(folder: Path) -> tuple[Path, Path]:
    """A tiny Llama in 4 bits (compressed-tensors, groups of 32 inputs), and a checkpoint of what its weights stand for.

    Written from the format's description: offset-binary numbers, eight to an int32, the first in the lowest bits.

    Returns:
        Directories of the quantized and of the plain checkpoint (float32).
    """
    dense, packed = build_tiny("llama", folder / "dense"), folder / "packed"
    tensors = load_file(dense / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for key, weight in list(tensors.items()):
        if not key.endswith("_proj.weight"):
            stored[key] = weight.to(torch.bfloat16)
            tensors[key] = stored[key].float()
            continue
        groups = weight.unflatten(1, (-1, 32))
        scale = (groups.abs().amax(2) / 7).to(torch.bfloat16)
        number = (groups / scale.float()[:, :, None]).round().clamp(-8, 7).int()
        tensors[key] = (number * scale.float()[:, :, None]).flatten(1)
        eight = (number + 8).flatten(1).unflatten(1, (-1, 8)).long()
        words = (eight << (4 * torch.arange(8))).sum(2)
        name = key.removesuffix("weight")
        stored[f"{name}weight_packed"] = torch.where(words >= 2**31, words - 2**32, words).int()
        stored[f"{name}weight_scale"] = scale
        stored[f"{name}weight_shape"] = torch.tensor(weight.shape)
    packed.mkdir()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (packed / "config.json").write_text(json.dumps(config))
    return packed, dense


class Reference:
    """Hugging Face's own greedy answers of a base model and of checkpoints merged in float64."""

    def __init__(self, folder: Path) -> None:
        multimodal = "text_config" in json.loads((folder / "config.json").read_text())
        auto_class: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        self.model: Any = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
        for config in (self.model.config, self.model.generation_config):
            config.eos_token_id = None  # every answer has the length asked for
        self.weights: dict[str, Tensor] = {
            name: module.weight.detach().clone()
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head" and (not multimodal or ".language_model." in name)
        }

    @torch.inference_mode()
    def logits(self, prompt: list[int], answer: list[int], adapter: AdapterSpec | None) -> Tensor:
        """The logits `[tokens, vocabulary]` that each token of an answer is chosen by."""
        put_weights(self.model, self.weights, adapter)
        logits: Tensor = self.model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        return logits

    @torch.inference_mode()
    def answer(self, prompts: list[list[int]], adapter: AdapterSpec | None, tokens: int) -> list[list[int]]:
        """The tokens that follow each prompt."""
        put_weights(self.model, self.weights, adapter)
        settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0)
        answers: list[list[int]] = [[] for _ in prompts]
        for length in {len(prompt) for prompt in prompts}:  # prompts of one length need no padding
            group = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
            ids = torch.tensor([prompts[index] for index in group])
            output = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            for index, row in zip(group, output[:, length:].tolist(), strict=True):
                answers[index] = row
        return answers
