"""Every kind of layer, every form of adapter: `doran serve --check` and vLLM's own layers give the same verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from adapter_specs import FORMS, AdapterSpec, make_adapter
from models import Reference
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
)
from walk import ask_vllm

from doran_core.errors import DoranError
from doran_serve import AdapterStore

TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ATTENTION = "model.layers.0.self_attn.q_proj"


def causal(config: Any) -> Callable[[], PreTrainedModel]:
    return lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def classifier() -> PreTrainedModel:
    config = LlamaConfig(**TINY, num_labels=3, pad_token_id=0)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


MODELS = {
    "untied": (causal(LlamaConfig(**TINY, tie_word_embeddings=False)), ["lm_head", "model.embed_tokens"]),
    "tied": (causal(Qwen2Config(**TINY, tie_word_embeddings=True)), ["model.embed_tokens"]),
    "classifier": (classifier, ["score", "model.embed_tokens"]),
    "experts": (
        causal(MixtralConfig(**TINY, num_local_experts=4)),
        ["model.layers.0.block_sparse_moe.experts.0.w1", "lm_head"],
    ),
}


def write_adapters(folder: Path, base: dict[str, torch.Tensor], names: list[str]) -> dict[str, Path]:
    """One adapter for each name and form; of embeddings, PEFT's LoRA, too."""
    adapters = {}
    for name in names:
        for form in FORMS:
            if form == "lora" and name.endswith("embed_tokens"):
                continue  # PEFT writes a LoRA of an embedding in another way, see below
            spec = make_adapter(form, {name: base[name]}, (name,), rank=4, seed=1, size=0.3)
            adapters[f"{form} on {name}"] = spec.write(folder / f"{form}-{name}")
    adapters["embedding LoRA"] = write_embedding_lora(folder / "embedding", base["model.embed_tokens"])
    return adapters


def write_embedding_lora(folder: Path, weight: torch.Tensor) -> Path:
    name = "model.embed_tokens"
    make_adapter("lora", {name: weight}, (name,), rank=4, seed=2, size=0.3).write(folder)
    path, prefix = folder / "adapter_model.safetensors", f"base_model.model.{name}"
    found = load_file(path)
    tensors = {
        f"{prefix}.lora_embedding_A": found[f"{prefix}.lora_B.weight"].T.contiguous(),
        f"{prefix}.lora_embedding_B": found[f"{prefix}.lora_A.weight"].T.contiguous(),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Adapters of every model, each beside its model's directory `base`."""
    made = {}
    for kind, (build, names) in MODELS.items():
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(3)
        build().save_pretrained(folder / "base")
        weights = load_file(folder / "base" / "model.safetensors")
        base = {key.removesuffix(".weight"): weight for key, weight in weights.items() if weight.ndim == 2}
        made[kind] = write_adapters(folder, base, [ATTENTION, *(name for name in names if name in base)])
    return made


@pytest.fixture(scope="module")
def verdicts(adapters: dict[str, dict[str, Path]]) -> dict[str, str]:
    """vLLM's verdicts on all these adapters, asked in one process."""
    return ask_vllm(
        {base_of(of_kind): (kind == "classifier", list(of_kind.values())) for kind, of_kind in adapters.items()}
    )


def base_of(adapters: dict[str, Path]) -> Path:
    return next(iter(adapters.values())).parent / "base"


@pytest.mark.parametrize("kind", MODELS)
def test_the_check_and_vllms_layers_agree(
    kind: str, adapters: dict[str, dict[str, Path]], verdicts: dict[str, str], tmp_path: Path
) -> None:
    base = base_of(adapters[kind])
    if reason := verdicts.get(str(base)):
        assert (kind, "modular kernel not supported" in reason) == ("experts", True), reason
        pytest.skip("vLLM has no LoRA layer for experts on this platform")
    store = AdapterStore(base, max_rank=16, cache_directory=tmp_path / "cache")
    for name, folder in adapters[kind].items():
        try:
            store.check(folder)
            refusal = ""
        except DoranError as error:
            refusal = str(error)
        assert bool(refusal) == bool(verdicts[str(folder)]), (
            f"{name}: check {refusal!r}, vLLM {verdicts[str(folder)]!r}"
        )
        if name.endswith(ATTENTION):
            assert not refusal, name
        elif not name.startswith(("lora", "embedding")):
            assert refusal, name


def test_the_output_head_in_a_running_engine(
    engine: Callable[..., Any], reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    """A LoRA there is stock vLLM's to serve; the other forms are refused, and the base goes on answering."""
    from vllm.lora.request import LoRARequest

    base, running, prompts = reference("llama"), engine("llama"), [[5, 6, 7, 8], [9, 10, 11, 12]]
    head = base.model.lm_head
    before = head.weight.detach().clone()
    specs: dict[str, AdapterSpec] = {
        form: make_adapter(form, {"lm_head": before}, ("lm_head",), rank=4, seed=5, size=0.5) for form in FORMS
    }
    requests = {
        form: LoRARequest(f"head-{form}", 300 + index, str(spec.write(tmp_path / form)))
        for index, (form, spec) in enumerate(specs.items())
    }
    untouched = base.answer(prompts, None, 6)
    for form in ("dora", "folded", "trainable"):
        with pytest.raises(DoranError, match=r"lm_head: vLLM serves this layer as output head"):
            running.answer(prompts, [requests[form], None], 6)
    try:
        head.weight.data.copy_(specs["lora"].merged("lm_head"))
        expected = base.answer(prompts[:1], None, 6)
    finally:
        head.weight.data.copy_(before)
    assert expected != untouched[:1]
    assert running.answer(prompts, [requests["lora"], None], 6) == [expected[0], untouched[1]]
