"""Every name, attribute and parameter of the installed vLLM that this package relies on."""

from __future__ import annotations

import inspect
import os
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from contract import REQUIRED, source_in

from doran_serve import compat
from doran_serve import vllm_symbols as symbols


def source(target: str) -> str:
    holder, attribute = symbols.locate(target)
    return inspect.getsource(getattr(holder, attribute))


def test_every_name_is_there() -> None:
    assert compat.missing_names() == []


def test_every_patch_says_why_and_until_when() -> None:
    for patch in compat.PATCHES:
        assert patch.reason, patch.target
        assert patch.checked, patch.target
        assert patch.remove_when, patch.target


def test_patching_twice_changes_nothing() -> None:
    compat.apply()
    before = [getattr(*symbols.locate(patch.target)) for patch in compat.PATCHES if symbols.exists(patch.target)]
    compat.apply()
    after = [getattr(*symbols.locate(patch.target)) for patch in compat.PATCHES if symbols.exists(patch.target)]
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_a_missing_name_is_refused_before_anything_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(symbols.NAMES, "gone", "vllm.lora.utils:no_such_thing")
    with pytest.raises(compat.UnsupportedVllmError, match="no_such_thing"):
        compat.apply()


@pytest.mark.parametrize("target", REQUIRED)
def test_the_attributes_are_there(target: str) -> None:
    text = source(target)
    assert [wanted for wanted in REQUIRED[target] if wanted not in text] == []


@pytest.mark.skipif("DORAN_TEST_VLLM_SOURCE" not in os.environ, reason="DORAN_TEST_VLLM_SOURCE names no other source")
def test_another_release_by_its_source() -> None:
    root = Path(os.environ["DORAN_TEST_VLLM_SOURCE"])
    names_and_patches = [*symbols.NAMES.values(), *(patch.target for patch in compat.PATCHES if not patch.optional)]
    assert [target for target in names_and_patches if source_in(root, target) is None] == []
    lacking = {
        target: [text for text in wanted if text not in (source_in(root, target) or "")]
        for target, wanted in REQUIRED.items()
    }
    assert {target: texts for target, texts in lacking.items() if texts} == {}


def test_signatures() -> None:
    weights = inspect.signature(symbols.lookup("LoRALayerWeights").__init__).parameters
    assert list(weights)[1:] == ["module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling"]
    assert list(inspect.signature(symbols.lookup("LoRAModel").__init__).parameters)[1:4] == [
        "lora_model_id",
        "rank",
        "loras",
    ]
    assert list(inspect.signature(symbols.lookup("parse_fine_tuned_lora_name")).parameters) == [
        "name",
        "weights_mapper",
    ]
    from vllm.model_executor.models.utils import WeightsMapper

    assert hasattr(WeightsMapper, "get_rename_mapper") or hasattr(WeightsMapper, "get_unstacked_mapper")


def test_vllm_has_no_place_for_a_scale_of_experts() -> None:
    """If this fails, vLLM's LoRA for experts has learnt to scale: then mixed mode can serve adapters of experts."""
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext

    names = {field.name for field in fields(MoELoRAContext)} | set(vars(FusedMoEWithLoRA))
    names |= set(inspect.signature(FusedMoEWithLoRA.set_lora).parameters)
    assert {name for name in names if any(word in name for word in ("scale", "magnitude", "dora"))} == set()
    # What a context carries for each adapter: factors alone.
    assert {name for name in names if name.endswith("_stacked")} == {
        *("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked")
    }


def test_what_the_swap_of_experts_relies_on() -> None:
    folder = "vllm.model_executor.layers.fused_moe"
    method = source(f"{folder}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod")
    for text in ('"w13_weight"', '"w2_weight"', "self.moe_kernel", "self.unquantized_backend", "w13_up_dim = 2 *"):
        assert text in method
    packing = source(f"{folder}.experts.cpu_moe:CPUUnquantizedExperts")
    for text in ("isa =", "cpu_prepack_moe_weight(layer.w13_weight, self.isa)", "new_w13[:, padded_size : padded_size"):
        assert text in packing
    experts = source(f"{folder}.routed_experts:RoutedExperts")
    for text in ("self.moe_config", "intermediate_size_per_partition", "enable_eplb", "def load_weights("):
        assert text in experts
    assert symbols.lookup_optional("pack_experts") is not None
