"""Layers whose weight a model reads instead of calling them, and what else "all-linear" and patterns leave out."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from conftest import disturb, logits, make_llama
from families import FAMILIES
from peft import PeftModel, get_peft_model
from sources import read_layers
from test_architectures import load, outputs, train
from tiny import text
from torch import nn

from doran_core import adapt
from doran_core.errors import DoranError, TargetError
from doran_core.layers.uncalled import READ_BY_CLASS
from doran_core.method.config import DoranConfig as CoreConfig
from doran_hf import DoranConfig
from doran_hf.layer import doran_layers

CALLED_AFTER_ALL = {
    "BloomAttention": "reads with slow_but_exact and pretraining_tp > 1 alone",
    "BloomMLP": "the same",
    "DisentangledSelfAttention": "reads in_proj for query_states of its own alone, which DeBERTa never hands over",
    "Gemma4AssistantForCausalLM": "reads a tied output layer for its shape",
    "Gemma4UnifiedAssistantForCausalLM": "the same",
}
TYPE_ALONE = ("wo", "fc2")
"""Layers of T5 and its kin whose weight is read for its type."""


def test_the_table_is_what_the_sources_of_transformers_say() -> None:
    for name, layers in read_layers().items():
        read = {layer for layer, called in layers.items() if not (called and layer in TYPE_ALONE)}
        assert read == set(READ_BY_CLASS.get(name, ())) or name in CALLED_AFTER_ALL, name
    assert not CALLED_AFTER_ALL.keys() & READ_BY_CLASS.keys()


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("mamba", "conv1d"), ("mamba", "dt_proj"), ("mamba", "out_proj"), ("mamba2", "conv1d"), ("mamba2", "out_proj"),
        ("jamba", "dt_proj"), ("t5", "shared"), ("bart", "shared"), ("siglip", "out_proj"),
    ],
)  # fmt: skip
def test_a_layer_that_is_read_is_refused_by_name(family: str, target: str) -> None:
    with pytest.raises(TargetError, match=f"{target}.*never called"):
        get_peft_model(FAMILIES[family].make(), DoranConfig(target_modules=[target]))
    with pytest.raises(TargetError, match=f"{target}.*never called"):
        adapt(FAMILIES[family].make(), CoreConfig(target_modules=[target]))


def test_a_layer_that_is_read_can_be_excluded() -> None:
    options = {"target_modules": ["out_proj"], "exclude_modules": [r"head.attention.out_proj"]}
    handle = adapt(FAMILIES["siglip"].make(), CoreConfig(**options))
    model = get_peft_model(FAMILIES["siglip"].make(), DoranConfig(**options))
    assert {layer.name for layer in doran_layers(model)} == set(handle.layers)
    assert handle.layers
    assert not any("head" in name for name in handle.layers)


def test_all_linear_leaves_them_out_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"leaves out .*mixer\.x_proj.*never called \(MambaMixer reads its weight\)"):
        model = get_peft_model(FAMILIES["mamba"].make(), DoranConfig(target_modules="all-linear"))
    assert {layer.name.rpartition(".")[2] for layer in doran_layers(model)} == {"in_proj"}
    with pytest.warns(UserWarning, match="leaves out .*dt_proj"):
        handle = adapt(FAMILIES["jamba"].make(), CoreConfig(target_modules="all-linear"))
    assert not any("dt_proj" in name for name in handle.layers)


def test_doran_cores_all_linear_names_the_experts_that_it_leaves_out() -> None:
    with pytest.warns(
        UserWarning, match=r"leaves out model\.layers\.0\.mlp\.experts\.gate_up_proj.* and 1 more, weights of exp"
    ):
        adapt(FAMILIES["mixtral"].make(), CoreConfig(target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(make_llama(), DoranConfig(target_modules="all-linear"))


def test_entries_that_mean_nothing_are_named() -> None:
    options = {"rank_pattern": {"q_proj": 2, "k_proj": 4}, "alpha_pattern": {r"layers\.9\.q_proj": 1.0}}
    for make in (
        lambda: get_peft_model(make_llama(), DoranConfig(**options)),
        lambda: adapt(make_llama(), CoreConfig(target_modules=["q_proj"], **options)),
    ):
        with pytest.warns(RuntimeWarning, match="rank_pattern: .*k_proj.* match no") as said:
            make()
        assert any("alpha_pattern: " in str(warning.message) for warning in said)
    with pytest.warns(UserWarning, match="exclude_modules: no target module matches 'o_proj', 'z_proj'"):
        get_peft_model(make_llama(), DoranConfig(exclude_modules=["z_proj", "o_proj", "layers.0.self_attn.q_proj"]))


def test_an_adapter_of_a_read_layer_that_is_there_can_still_be_loaded(tmp_path: Path) -> None:
    """Earlier versions made such adapters; their tensors are still what they were."""
    family = FAMILIES["jamba"]
    family.make().save_pretrained(tmp_path / "base")
    config = DoranConfig(target_modules=["in_proj", "dt_proj"], created_by="doran-hf 0.0")
    model = get_peft_model(load(family, tmp_path / "base"), config)
    disturb(model)
    expected = outputs(model, text())
    with pytest.warns(UserWarning, match="1 of 2 adapted layers were never called"):
        model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(family, tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, text())[0], expected[0])


class HalfUsed(nn.Module):
    """Its second layer's weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) @ self.second.weight.T


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload", "save_pretrained"])
def test_a_layer_that_no_pass_has_called_is_named(way: str, tmp_path: Path) -> None:
    model = get_peft_model(HalfUsed(), DoranConfig(target_modules=["first", "second"]))
    model(torch.ones(2, 6))
    with pytest.warns(UserWarning, match=r"1 of 2 adapted layers were never called \(second\)") as said:
        getattr(model, way)(*([tmp_path] if way == "save_pretrained" else []))
    assert len([warning for warning in said if "never called" in str(warning.message)]) == 1


@pytest.mark.parametrize("way", ["merge", "save"])
def test_and_in_doran_core(way: str, tmp_path: Path) -> None:
    handle = adapt(HalfUsed(), CoreConfig(target_modules=["first", "second"]))
    handle.model(torch.ones(2, 6))
    with pytest.warns(UserWarning, match=r"1 of 2 adapted layers were never called \(second\)"):
        getattr(handle, way)(*([tmp_path / "a"] if way == "save" else []))


def test_nothing_is_said_where_all_are_called_or_none() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(make_llama(), DoranConfig())
        model.merge_adapter()  # as after loading
        model.unmerge_adapter()
        logits(model)
        model.merge_adapter()


@pytest.mark.parametrize("padded", [False, True])
def test_pytorchs_encoder_does_not_skip_the_adapter(padded: bool) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = get_peft_model(nn.TransformerEncoder(encoder, 2), DoranConfig(target_modules=["linear1", "linear2"]))
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    options = {"src_key_padding_mask": padding} if padded else {}
    with torch.no_grad():
        base = model.eval()(x, **options)
        disturb(model)
        inferred = model(x, **options)[~padding]
        trained = model.train()(x, **options)[~padding]
        merged = model.merge_and_unload().eval()(x, **options)[~padding]
    torch.testing.assert_close(inferred, trained)
    torch.testing.assert_close(merged, trained, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(base[~padding], trained, atol=1e-2)


def test_a_head_by_the_name_of_an_output_embedding_is_trained_in_full(tmp_path: Path) -> None:
    """PEFT would save embeddings with it, and fails for want of them."""
    family = FAMILIES["wav2vec2"]
    with pytest.raises(DoranError, match=r"lm_head.*modules_to_save"):
        get_peft_model(family.make(), DoranConfig(target_modules=["q_proj", "lm_head"]))
    model = get_peft_model(family.make(), DoranConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    train(model, family)
    expected = outputs(model, family.inputs())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.make(), tmp_path)
    assert torch.equal(outputs(loaded, family.inputs())[0], expected[0])


def test_a_module_that_peft_trains_in_full_is_not_adapted() -> None:
    """DistilBERT's "pre_classifier" ends in "classifier"."""
    family = FAMILIES["distilbert classifier"]
    with pytest.raises(TargetError, match="pre_classifier: modules_to_save='classifier' matches this module, too"):
        get_peft_model(family.make(), DoranConfig(target_modules=["pre_classifier"], task_type="SEQ_CLS"))
