"""Tiny mixture-of-experts models from configurations, one of them with transposed weights and biases."""

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
EXPERTS = 4
_SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make_moe(family: str, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights, the same for the same arguments."""
    torch.manual_seed(0)
    routed = {"num_experts_per_tok": 2}
    if family == "mixtral":
        config, model_class = MixtralConfig(num_local_experts=EXPERTS, **routed, **_SIZES), MixtralForCausalLM
    elif family == "qwen3_moe":
        sizes = {"moe_intermediate_size": 24, "head_dim": 8}
        config, model_class = Qwen3MoeConfig(num_experts=EXPERTS, **sizes, **routed, **_SIZES), Qwen3MoeForCausalLM
    elif family == "olmoe":
        config, model_class = OlmoeConfig(num_experts=EXPERTS, **routed, **_SIZES), OlmoeForCausalLM
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        sizes = {"head_dim": 8, "rope_parameters": rope}
        config, model_class = GptOssConfig(num_local_experts=EXPERTS, **sizes, **routed, **_SIZES), GptOssForCausalLM
    model = model_class._from_config(config, experts_implementation=implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3 or name.endswith("bias") or "router" in name or "gate.weight" in name:
                parameter.normal_(0.0, 0.2)
    return model.to(dtype).eval()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    """The same ones each time."""
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def train(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    """The model with values away from the start in whatever is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model
