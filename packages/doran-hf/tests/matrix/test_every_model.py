"""What PEFT tests of each of its methods on each model, for DORAN: PEFT's tests/testing_common.py, re-created.

Each test says in its first line which of PEFT's tests it stands for.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ALL, CUSTOM, DECODERS, ENCODERS, GENERATING, TRANSFORMERS, Case, stir
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_base_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from doran_core.errors import NonFiniteError
from doran_hf import DoranConfig
from doran_hf.layer import DoranLayer, doran_layers

every_model = pytest.mark.parametrize("case", ALL.values(), ids=ALL)
every_transformer = pytest.mark.parametrize("case", TRANSFORMERS.values(), ids=TRANSFORMERS)
every_generating = pytest.mark.parametrize("case", GENERATING.values(), ids=GENERATING)
every_custom = pytest.mark.parametrize("case", CUSTOM.values(), ids=CUSTOM)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


@every_model
def test_start_disable_and_enable(case: Case) -> None:
    """_test_disable_adapter, test_disable_adapters_exiting_context_*: off is the base, on again is as before."""
    base = case.base()
    expected = case.output(base)
    model = get_peft_model(base, case.config())
    assert close(case.output(model), expected, 1e-6)
    stir(model, "default")
    adapted = case.output(model)
    assert not close(adapted, expected, 1e-4)
    with model.disable_adapter():
        assert torch.equal(case.output(model), expected) or case.config().bias != "none"
    assert torch.equal(case.output(model), adapted)
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert all(layer.disable_adapters for layer in doran_layers(model))
    model.enable_adapter_layers()
    assert torch.equal(case.output(model), adapted)


@every_model
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(case: Case, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """_test_save_pretrained, _test_load_model_low_cpu_mem_usage, test_save_load_roundtrip, test_parameters_after_..."""
    model = case.adapted()
    expected = case.output(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    assert config["peft_type"] == "DORAN"
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(case.output(loaded), expected)
    before, after = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert before.keys() == after.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    # PEFT leaves biases trainable that train with an adapter, here as with LoRA.
    assert not any(p.requires_grad and not name.endswith("base_layer.bias") for name, p in loaded.named_parameters())


@every_model
def test_only_the_adapter_learns(case: Case, tmp_path: Path) -> None:
    """_test_training, test_training_custom_models, test_only_params_are_updated: two steps, then saved and loaded."""
    model = case.adapted()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        case.loss(model).backward()
        optimizer.step()
    saved = [f"{name}." for name in case.config().modules_to_save or []]
    for name, parameter in model.named_parameters():
        ours = ".doran_adapter.default." in name or any(f".{s}modules_to_save.default" in f".{name}" for s in saved)
        bias = case.config().bias == "doran_only" and name.endswith(".base_layer.bias")
        assert parameter.requires_grad == (ours or bias or ("modules_to_save" in name and ".default." in name)), name
        moved = not torch.equal(parameter, before[name])
        steep = parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-4  # else a step may round to none
        assert parameter.requires_grad or not moved, name
        assert moved or not steep, name
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith((".magnitude", ".w2_A", ".w2_B")))
    expected = case.output(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(case.output(PeftModel.from_pretrained(case.base(), tmp_path)), expected)


@every_model
def test_merge_unmerge_and_unload(case: Case) -> None:
    """_test_merge_layers, _is_idempotent, _test_safe_merge, test_disable_adapters_with_merging, _test_unload_*."""
    base = case.output(case.base())
    model = case.adapted()
    expected = case.output(model)
    model.merge_adapter(safe_merge=True)
    merged = case.output(model)
    assert close(merged, expected, 1e-4)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(case.output(model), merged)
    with model.disable_adapter():
        if case.config().bias == "none":
            assert torch.equal(case.output(model), base)
    model.unmerge_adapter() if any(layer.merged for layer in doran_layers(model)) else None
    assert torch.equal(case.output(model), expected)
    plain = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, DoranLayer) for module in plain.modules())
    assert close(case.output(plain), expected, 1e-4)
    assert not any("doran_" in name for name in plain.state_dict())
    if case.config().modules_to_save is None and case.config().bias == "none" and case.config().task_type != "SEQ_CLS":
        assert torch.equal(case.output(model.unload()), base)


@every_model
def test_safe_merge_finds_what_is_not_finite(case: Case) -> None:
    """_test_merge_layers_nan: refused by name, and the base weight is as it was."""
    model = case.adapted()
    weights = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    first = next(doran_layers(model))
    with torch.no_grad():
        first.adapter("default").magnitude.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=first.name):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    model = model.merge_and_unload(safe_merge=False)
    assert any(not bool(p.isfinite().all()) for p in model.parameters())


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    """_test_merge_layers_fp16, _test_generate_half_prec, test_forward_float16, test_forward_bfloat16, *_no_autocast."""
    base = case.base(dtype)
    if case.inputs().get("pixel_values") is not None:
        inputs = case.inputs
        case = Case(case.make, lambda: {k: v.to(dtype) for k, v in inputs().items()}, case.options)
    expected = case.output(base)
    model = get_peft_model(base, case.config())
    assert torch.equal(case.output(model), expected)
    stir(model, "default")
    adapted = case.output(model)
    assert adapted.dtype == expected.dtype
    assert bool(adapted.isfinite().all())
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".doran_adapter." in n)
    merged = case.output(model.merge_and_unload())
    assert close(merged.float(), adapted.float(), 0.1)


@every_transformer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(case: Case, use_reentrant: bool) -> None:
    """_test_training_gradient_checkpointing, both kinds: the gradients are those without it."""
    model = case.adapted()
    if not getattr(model.get_base_model(), "supports_gradient_checkpointing", False):
        pytest.skip("the model has no gradient checkpointing")
    if "pixel_values" in case.inputs() and use_reentrant:
        pytest.skip(
            "reentrant checkpointing needs inputs that require gradients; images have no embedding layer for it"
        )
    gradients = []
    for checkpointing in (False, True):
        again = copy.deepcopy(model)
        if checkpointing:
            if "pixel_values" not in case.inputs():
                again.enable_input_require_grads()
            again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        case.loss(again).backward()
        gradients.append({name: p.grad for name, p in again.named_parameters() if ".doran_adapter." in name})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@every_model
def test_two_adapters(case: Case, tmp_path: Path) -> None:
    """_test_load_multiple_adapters, _test_merge_layers_multi, _test_delete_*: each computes what it computes alone."""
    if case.config().bias != "none":
        pytest.skip("only one adapter may train biases, see test_biases_are_for_one_adapter")
    model = case.adapted("first")
    first = case.output(model)
    model.add_adapter("second", case.config(rank=3))
    stir(model, "second", seed=6)
    model.set_adapter("second")
    assert model.active_adapters == ["second"]
    second = case.output(model)
    assert not close(second, first, 1e-4)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "first", "second"}
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"README.md", "second"}

    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "first", adapter_name="a")
    loaded.load_adapter(tmp_path / "one" / "second", adapter_name="ab")  # one name is the other's beginning
    assert torch.equal(case.output(loaded), first)
    loaded.set_adapter("ab")
    assert torch.equal(case.output(loaded), second)
    assert not any(".ab." in name for name in get_peft_model_state_dict(loaded, adapter_name="a"))

    for name, expected in (("first", first), ("second", second)):
        model.set_adapter(name)
        model.merge_adapter([name])
        assert close(case.output(model), expected, 1e-4)
        model.unmerge_adapter()
    model.delete_adapter("first")
    assert torch.equal(case.output(model), second)
    assert not any(".first." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="first"):
        model.delete_adapter("first")


@every_model
def test_deleting_leaves_nothing_behind(case: Case) -> None:
    """test_delete_adapter_properly_cleans_up_after_itself, test_delete_merged_adapter_raises_without_mutation."""
    model = case.adapted("foobar")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("foobar")
    assert "foobar" in model.peft_config
    model.unmerge_adapter()
    model.delete_adapter("foobar")
    assert not any("foobar" in name for name, _ in [*model.named_modules(), *model.named_parameters()])
    assert "foobar" not in model.peft_config


@every_model
def test_mixed_adapters_in_one_batch(case: Case) -> None:
    """_test_mixed_adapter_batches, test_mixed_adapter_batches_*: each row as with its own adapter, base included."""
    options = {"modules_to_save": None, "bias": "none", "task_type": None}
    model = case.adapted("one", **options)
    model.add_adapter("two", case.config(rank=2, **options))
    stir(model, "two", seed=9)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = case.output(model)
    with model.disable_adapter():
        alone["__base__"] = case.output(model)
    rows = alone["one"].shape[0]
    names = [["one", "__base__", "two"][row % 3] for row in range(rows)]
    found = case.output(model, adapter_names=names)
    for row, name in enumerate(names):
        assert close(found[row], alone[name][row], 1e-5), (row, name)
    with pytest.raises(ValueError, match="no adapter 'three'"):
        case.output(model, adapter_names=["three"] * rows)
    with pytest.raises(ValueError, match=f"{rows + 1} adapter_names for"):
        case.output(model, adapter_names=["one"] * (rows + 1))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        model.train()(**case.inputs(), adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        case.output(model, adapter_names=names)


@every_generating
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate(case: Case, num_beams: int) -> None:
    """_test_generate, _test_generate_pos_args, _test_generate_with_mixed_adapter_batches_and_beam_search."""
    model = case.adapted("one", bias="none")
    model.add_adapter("two", case.config(bias="none"))
    stir(model, "two", seed=9)
    ids = case.inputs()["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    options |= {"return_dict_in_generate": True, "output_scores": True, "attention_mask": torch.ones_like(ids)}
    with model.disable_adapter():
        base = model.generate(input_ids=ids, **options).scores[0]
    one = model.generate(input_ids=ids, **options).scores[0]
    if not model.get_base_model().config.is_encoder_decoder:  # PEFT's generate for these takes no positional arguments
        assert torch.equal(model.generate(ids, **options).scores[0], one)
    model.set_adapter("two")
    two = model.generate(input_ids=ids, **options).scores[0]
    mixed = model.generate(input_ids=ids, adapter_names=["two", "__base__", "one"], **options).scores[0]
    for row, expected in enumerate((two, base, one)):
        rows = slice(row * num_beams, (row + 1) * num_beams)
        finite = expected[rows].isfinite()
        torch.testing.assert_close(mixed[rows][finite], expected[rows][finite], atol=1e-4, rtol=1e-4)
    assert not close(one, two, 1e-4)


@every_model
def test_attributes_and_the_base_models_own_state(case: Case) -> None:
    """_test_model_attr, _test_adapter_name, _test_get_base_model_state_dict."""
    base = case.base()
    original = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, case.config(), adapter_name="mine")
    assert all(hasattr(model, name) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))
    assert model.peft_config.keys() == {"mine"}
    found = get_base_model_state_dict(model)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name]) for name in original)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(0.1)
    result = set_base_model_state_dict(model, original, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(value, original[name]) for name, value in get_base_model_state_dict(model).items())


@every_transformer
def test_gradients_of_the_inputs(case: Case) -> None:
    """_test_prepare_for_training."""
    model = case.adapted()
    if "input_ids" in case.inputs():
        assert not model.get_input_embeddings()(case.inputs()["input_ids"]).requires_grad
        model.enable_input_require_grads()
        assert model.get_input_embeddings()(case.inputs()["input_ids"]).requires_grad


@pytest.mark.parametrize("case", [*DECODERS.values(), *ENCODERS.values()], ids=[*DECODERS, *ENCODERS])
def test_embedded_inputs(case: Case) -> None:
    """_test_passing_input_embeds_works."""
    if "input_ids" not in case.inputs():
        pytest.skip("the model takes images")
    model = case.adapted()
    expected = case.output(model)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(case.inputs()["input_ids"])
        found = model(inputs_embeds=embedded)
    assert close(getattr(found, "logits", found[0]), expected, 10.0)  # gemma scales its embeddings inside


@every_custom
def test_sizes_and_repr(case: Case) -> None:
    """test_in_features_out_features_exposed, test_repr_lora_*, test_weight_bias_attributes."""
    model = case.adapted()
    for layer in doran_layers(model):
        assert re.match(r"doran\.\w+DoranLayer\(", repr(layer))
        assert "default" in repr(layer)
        assert layer.weight is layer.get_base_layer().weight
        if isinstance(layer.get_base_layer(), nn.Linear):
            assert (layer.in_features, layer.out_features) == layer.get_base_layer().weight.shape[::-1]


@every_custom
def test_the_adapters_name_makes_no_difference(case: Case) -> None:
    """test_adapter_name_makes_no_difference."""
    outputs, states = [], []
    for name in ("default", "adapter", "other-name"):
        model = case.adapted(name)
        outputs.append(case.output(model))
        states.append({key.replace(f".{name}", ""): value for key, value in model.state_dict().items()})
    for output, state in zip(outputs[1:], states[1:], strict=True):
        assert torch.equal(output, outputs[0])
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


@every_custom
def test_a_given_configuration_is_used_on_loading(case: Case, tmp_path: Path) -> None:
    """_test_from_pretrained_config_construction."""
    case.adapted().save_pretrained(tmp_path)
    config = DoranConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True, config=config)
    assert loaded.peft_config["default"] is config
    assert all(p.requires_grad for n, p in loaded.named_parameters() if ".doran_adapter." in n)


@every_transformer
def test_layer_indexing(case: Case) -> None:
    """_test_training_layer_indexing: only the asked blocks get an adapter."""
    config = case.config()
    targets = config.target_modules
    if isinstance(targets, str) or case.options.get("modules_to_save"):
        pytest.skip("layers_to_transform goes with a list of names")
    full = get_peft_model(case.base(), case.config())
    names = sorted({layer.name.rpartition(".")[2] for layer in doran_layers(full)})
    model = get_peft_model(case.base(), case.config(target_modules=names, layers_to_transform=[0]))
    found = [layer.name for layer in doran_layers(model)]
    assert found
    number = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
    assert set(found) == {layer.name for layer in doran_layers(full) if number.search(layer.name)[1] == "0"}  # type: ignore[index]
