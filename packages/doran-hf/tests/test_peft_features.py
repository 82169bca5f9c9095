"""What PEFT has for LoRA alone, or leaves to each method: sums, hot-swapping, conversion, replication, ties."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import disturb, logits, make_gpt2, make_llama
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM

from doran_core import read_adapter
from doran_core.adapter.digest import seal_directory
from doran_core.errors import BaseMismatchError, ConfigError, DoranError, NonFiniteError, TensorShapeError
from doran_hf import DoranConfig, hotswap_adapter
from doran_hf.layer import doran_layers

SECOND: dict[str, Any] = {"rank": 3, "target_modules": ["v_proj", "up_proj"], "factors": "static", "tau_kind": "zero"}


def two_adapters() -> PeftModel:
    model = get_peft_model(make_llama(), DoranConfig(rank=4))
    model.add_adapter("second", DoranConfig(**SECOND))
    disturb(model, "default")
    disturb(model, "second", seed=6, size=0.2)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {layer.name: layer.original_weight().double() for layer in doran_layers(model)}


class TestWeightedSum:
    def test_is_exactly_the_sum_of_the_changes(self, tmp_path: Path) -> None:
        model = two_adapters()
        expected = weights_of(model)
        shares = {"default": 0.75, "second": -0.4}
        for layer in doran_layers(model):
            weight = layer.original_weight()
            for name, share in shares.items():
                if name in layer.doran_adapter:
                    expected[layer.name] += share * (layer.adapter(name).merged_weight(weight) - weight.double())
        model.add_weighted_adapter(list(shares), list(shares.values()), "sum")
        assert {layer.name for layer in doran_layers(model, "sum")} == expected.keys()
        for layer in doran_layers(model, "sum"):
            found = layer.adapter("sum").merged_weight(layer.original_weight())
            torch.testing.assert_close(found, expected[layer.name], atol=1e-6, rtol=1e-5)
        assert model.active_adapters == ["default"]
        training = {
            name.split(".doran_adapter.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad
        }
        assert training == {"default"}

        model.set_adapter("sum")
        summed = logits(model)
        plain = make_llama()
        for name, weight in expected.items():
            plain.get_submodule(name).weight.data.copy_(weight)
        torch.testing.assert_close(summed, logits(plain), atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path / "sum")), summed)
        assert read_adapter(tmp_path / "sum").modules.keys() == expected.keys()

    def test_one_adapter_with_weight_one_is_itself(self) -> None:
        model = two_adapters()
        expected = logits(model)
        model.add_weighted_adapter(["default"], [1.0], "same")
        model.set_adapter("same")
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ((["default", "third"], [1, 1], "new"), "no DoRAN adapter 'third'"),
            ((["default"], [1, 1], "new"), "a weight for each"),
            ((["default"], [float("nan")], "new"), "expected numbers"),
            ((["default", "default"], [1, 1], "new"), "each once"),
            ((["default"], [1], "second"), "there is an adapter 'second'"),
            ((["default"], [1], "new", "svd"), "expected 'cat'"),
        ],
    )
    def test_what_cannot_be_combined_is_said(self, given: tuple[Any, ...], message: str) -> None:
        model = two_adapters()
        with pytest.raises(ConfigError, match=message):
            model.add_weighted_adapter(*given)
        assert set(model.peft_config) == {"default", "second"}

    def test_merged_adapters_have_to_be_unmerged(self) -> None:
        model = two_adapters()
        model.merge_adapter(["default"])
        with pytest.raises(DoranError, match=r"\['default'\] are merged"):
            model.add_weighted_adapter(["default", "second"], [1, 1], "new")

    def test_a_scale_of_zero_is_refused_and_nothing_is_added(self) -> None:
        model = two_adapters()
        layer = next(doran_layers(model, "default"))
        adapter = layer.adapter("default")
        with torch.no_grad():
            scale = adapter.scale_and_factors(layer.view)[0]
            adapter.magnitude[3] *= 0.5 / scale[3]  # c = 1/2, so that twice the change leaves nothing of W0
        with pytest.raises(NonFiniteError, match=layer.name):
            model.add_weighted_adapter(["default"], [2.0], "new")
        assert set(model.peft_config) == {"default", "second"}


class TestHotSwap:
    def save(self, folder: Path, seed: int, base_seed: int = 0, **options: Any) -> torch.Tensor:
        model = get_peft_model(make_llama(seed=base_seed), DoranConfig(**{"rank": 4} | options))
        disturb(model, seed=seed)
        model.save_pretrained(folder)
        return logits(model)

    def test_a_compiled_model_goes_on_with_the_other_adapter(self, tmp_path: Path) -> None:
        first, second = self.save(tmp_path / "one", 1), self.save(tmp_path / "two", 2)
        model = PeftModel.from_pretrained(make_llama(), tmp_path / "one")
        places = {name: p.data_ptr() for name, p in model.named_parameters()}
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled), first, atol=1e-5, rtol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name, expected in (("two", second), ("one", first)):
                hotswap_adapter(compiled, str(tmp_path / name))
                torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-5)
                assert torch.equal(logits(model), expected)
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == places

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"rank": 3}, ConfigError, r"rank=3 \(here 4\)"),
            ({"tau_kind": "zero", "alpha": 4.0}, ConfigError, r"alpha=4.0 \(here 16.0\), .*tau_kind='zero'"),
            ({"modules_to_save": ["lm_head"]}, ConfigError, r"modules_to_save=\['lm_head'\] \(here None\)"),
            ({"target_modules": "all-linear"}, DoranError, "the adapter 'default' has no tensor"),
            ({"target_modules": ["q_proj"]}, DoranError, "are missing"),
            ({"base_seed": 3}, BaseMismatchError, "made for the base weights"),
        ],
        ids=str,
    )
    def test_an_adapter_that_does_not_fit_changes_nothing(
        self, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
    ) -> None:
        expected = self.save(tmp_path / "one", 1)
        self.save(tmp_path / "two", 2, **options)
        model = PeftModel.from_pretrained(make_llama(), tmp_path / "one")
        with pytest.raises(error, match=message):
            hotswap_adapter(model, str(tmp_path / "two"))
        assert torch.equal(logits(model), expected)

    def test_wrong_shapes_are_found_before_anything_is_copied(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        expected = self.save(tmp_path / "one", 1)
        self.save(tmp_path / "two", 2)
        path = tmp_path / "two" / "adapter_model.safetensors"
        tensors = load_file(path)
        key = next(key for key in tensors if key.endswith("layers.2.self_attn.v_proj.doran_adapter.magnitude"))
        tensors[key] = tensors[key][:-1].clone()
        save_file(tensors, path, metadata={"format": "pt"})
        seal_directory(path.parent)
        model = PeftModel.from_pretrained(make_llama(), tmp_path / "one")
        with pytest.raises(TensorShapeError, match=r"magnitude' has shape \[15\], expected \[16\]"):
            hotswap_adapter(model, str(tmp_path / "two"))
        assert torch.equal(logits(model), expected)

    def test_a_merged_or_foreign_adapter_is_refused(self, tmp_path: Path) -> None:
        self.save(tmp_path / "one", 1)
        model = PeftModel.from_pretrained(make_llama(), tmp_path / "one")
        with pytest.raises(ConfigError, match="no DoRAN adapter 'other'"):
            hotswap_adapter(model, str(tmp_path / "one"), "other")
        get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
        with pytest.raises(ConfigError, match="expected DORAN"):
            hotswap_adapter(model, str(tmp_path / "lora"))
        model.merge_adapter()
        with pytest.raises(DoranError, match="is merged"):
            hotswap_adapter(model, str(tmp_path / "one"))


@pytest.mark.parametrize(("make", "targets", "full"), [(make_llama, ["v_proj"], 16), (make_gpt2, ["c_attn"], 32)])
def test_converts_to_lora(make: Any, targets: list[str], full: int) -> None:
    """PEFT's `convert_to_lora`: of full rank it is the same function, of a lower one an approximation."""
    family = "gpt2" if make is make_gpt2 else "llama"
    model = get_peft_model(make(), DoranConfig(rank=4, target_modules=targets))
    disturb(model)
    expected, base = logits(model, family), logits(make(), family)
    error = {}
    for rank in (4, full):
        config, tensors = convert_to_lora(model, rank)
        lora = get_peft_model(make(), copy.deepcopy(config))
        assert not set_peft_model_state_dict(lora, tensors).unexpected_keys
        error[rank] = float((logits(lora, family) - expected).abs().max())
    assert 1e-3 < error[4] < float((base - expected).abs().max())
    assert error[full] < 1e-4


def test_replicated_layers_have_adapters_of_their_own(tmp_path: Path) -> None:
    """test_lora_layer_replication: shared base weights, one adapter for each copy, saved, loaded and merged."""
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "layer_replication": [[0, 2], [1, 3]]}
    model = get_peft_model(make_llama(), DoranConfig(**options))
    layers = model.get_base_model().model.layers
    assert len(layers) == model.config.num_hidden_layers == 4
    assert len({layer.name for layer in doran_layers(model)}) == 8
    first, copied = (layers[index].self_attn.q_proj for index in (1, 2))
    assert first.original_weight().data_ptr() == copied.original_weight().data_ptr()
    assert first.adapter("default").magnitude.data_ptr() != copied.adapter("default").magnitude.data_ptr()
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(DoranError, match="layer_replication"):  # files alone do not say what the model becomes
        read_adapter(tmp_path / "adapter")
    loaded.load_adapter(tmp_path / "adapter", "again")  # not replicated a second time
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(ConfigError, match="the first adapter decides"):
        loaded.add_adapter("other", DoranConfig(layer_replication=[[0, 2]]))
    loaded.delete_adapter("again")
    loaded.set_adapter("default")
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="layer_replication"):
        DoranConfig(layer_replication=[[2, 1]])


def test_peft_sees_its_method_and_state() -> None:
    """get_model_status, and injection by the keys of a state dict."""
    model = two_adapters()
    status = model.get_model_status()
    assert status.peft_types == {"default": "DORAN", "second": "DORAN"}
    assert status.active_adapters == ["default"]
    tensors = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}
    plain = inject_adapter_in_model(DoranConfig(rank=4), make_llama(), state_dict=tensors)
    set_peft_model_state_dict(plain, tensors)
    assert torch.equal(logits(plain), logits(model))


def tied_llama() -> Any:
    model = make_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def test_a_tied_embedding_that_is_saved_stays_tied(tmp_path: Path) -> None:
    """test_weight_tying_tied_model_*: `ensure_weight_tying` with the embedding in modules_to_save."""
    config = DoranConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(tied_llama(), config)
    embedding, head = model.get_base_model().model.embed_tokens, model.get_base_model().lm_head
    assert embedding.modules_to_save["default"].weight is head.modules_to_save["default"].weight
    with torch.no_grad():
        embedding.modules_to_save["default"].weight.mul_(1.1)
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(tied_llama(), tmp_path / "adapter")), expected)
    merged = model.merge_and_unload()
    assert merged.model.embed_tokens.weight is merged.lm_head.weight
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)


def test_a_tied_embedding_cannot_share_its_adapter() -> None:
    model = tied_llama()
    with pytest.raises(ConfigError, match="norms are over the other axis"):
        get_peft_model(model, DoranConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
    assert not list(doran_layers(model))
