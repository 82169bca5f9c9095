"""What a row of families.py is, and what its rows share: sizes and inputs of tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 61
SPREAD = 0.17
"""Of the random weights: 1 / sqrt(width), so that what an adapter changes shows in the outputs."""
Inputs = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_class: name of a class of transformers.
        config_class: name of its configuration's class.
        values: of the configuration.
        inputs: of a forward pass.
        targets: what is adapted beside the tied ends.
        options: others of DoranConfig.
    """

    model_class: str
    config_class: str
    values: dict[str, Any]
    inputs: Inputs
    targets: str | list[str] = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def auto_class(self) -> Any:
        """The class that builds and loads the model."""
        return getattr(tf, self.model_class)

    def make(self) -> Any:
        """The base model, the same at each call."""
        torch.manual_seed(0)
        model = self.auto_class(getattr(tf, self.config_class)(**self.values))
        _spread(model)
        return model.eval()


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Move away from their start the vectors that start at 0 or 1: an adapter's error must not hide behind them."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith(("weight", "bias")):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def random_values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def random_tokens(rows: int = 2, columns: int = 7) -> Tensor:
    return torch.randint(5, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(1))


def text() -> dict[str, Tensor]:
    """Token ids."""
    return {"input_ids": random_tokens()}


def text_pairs() -> dict[str, Tensor]:
    """Token ids for an encoder and its decoder."""
    return {"input_ids": random_tokens(), "decoder_input_ids": random_tokens(2, 4)}


def pixels(side: int, channels: int = 3) -> Inputs:
    """Square images."""
    return lambda: {"pixel_values": random_values(2, channels, side, side)}


def text_and_pixels(side: int) -> Inputs:
    """For two towers side by side."""
    return lambda: {"input_ids": random_tokens(), "pixel_values": random_values(2, 3, side, side)}


IMAGE_TOKEN = 4


def image_in_text(count: int, image: Callable[[], dict[str, Tensor]]) -> Inputs:
    """Texts with ``count`` places for an image's tokens."""

    def make() -> dict[str, Tensor]:
        ids = torch.cat([random_tokens(2, 2), torch.full((2, count), IMAGE_TOKEN), random_tokens(2, 3)], dim=1)
        return {"input_ids": ids, **image()}

    return make


TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": SPREAD,
}

GROUPED = {"num_key_value_heads": 2}

VISION: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "initializer_range": SPREAD,
}

BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "init_std": SPREAD,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
    **TOKENS,
}

TEXT_PART = {**SMALL, **TOKENS, **GROUPED}
