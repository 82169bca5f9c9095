"""Tiny random models of several families, and helpers that make adapters do something. No network, no files."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="doran-hf-tests-")  # read on import: caches of models and data sets
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

import doran_hf  # noqa: F401  registers the method

sys.path.append(str(Path(__file__).parents[3] / "tests"))  # smollm2.py

torch.set_num_threads(1)  # the models are too small for more

VOCABULARY = 97
SPREAD = 0.17
"""Of the random weights: 1 / sqrt(width), so that what an adapter changes shows in the logits."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: the session hf-long runs it, before a release")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-architectures", action="store_true", help="every family of tests/architectures")


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def make_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        initializer_range=SPREAD,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_gpt2(dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        initializer_range=SPREAD,
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def make_bert(dtype: torch.dtype = torch.float32, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        initializer_range=SPREAD,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=3,
    )
    return BertForSequenceClassification(config).to(dtype).eval()


def make_vit(dtype: torch.dtype = torch.float32, seed: int = 0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(
        initializer_range=SPREAD,
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=10,
    )
    return ViTForImageClassification(config).to(dtype).eval()


MAKERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": make_llama,
    "gpt2": make_gpt2,
    "bert": make_bert,
    "vit": make_vit,
}


def make_inputs(family: str, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (3, 9), generator=generator)}


@torch.no_grad()
def logits(model: nn.Module, family: str = "llama", **extra: Tensor) -> Tensor:
    model.eval()
    inputs = make_inputs(family)
    if family == "vit":
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    return model(**inputs, **extra).logits


@torch.no_grad()
def disturb(model: nn.Module, adapter_name: str = "default", seed: int = 5, size: float = 0.1) -> None:
    """Move every tensor of an adapter away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".doran_adapter.{adapter_name}." in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=size if parameter.abs().max() == 0 else size * float(parameter.abs().mean()))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for bitsandbytes' blocks of 64 values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.12, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load_quantized(folder: Path, bits: int) -> LlamaForCausalLM:
    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32, device_map="cpu"
    )
    for module in model.modules():
        # On some CPUs a first forward pass in eval mode repacks the weight for a bfloat16 kernel without a gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
