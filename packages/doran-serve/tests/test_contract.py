"""Every name, attribute and parameter of the installed vLLM that this package relies on."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("vllm")

from doran_serve import compat, names


def source(target: str) -> str:
    holder, attribute = names.locate(target)
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
    before = [getattr(*names.locate(patch.target)) for patch in compat.PATCHES if names.exists(patch.target)]
    compat.apply()
    after = [getattr(*names.locate(patch.target)) for patch in compat.PATCHES if names.exists(patch.target)]
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_a_missing_name_is_refused_before_anything_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.NAMES, "gone", "vllm.lora.utils:no_such_thing")
    with pytest.raises(compat.UnsupportedVllmError, match="no_such_thing"):
        compat.apply()


@pytest.mark.parametrize(
    ("target", "attributes"),
    [
        ("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA", ["base_layer", "device", "tp_size", "n_slices"]),
        (
            "vllm.lora.layers.column_parallel_linear:ColumnParallelLinearWithLoRA",
            ["self.output_size =", "slice_lora_b"],
        ),
        ("vllm.lora.layers.row_parallel_linear:RowParallelLinearWithLoRA", ["self.output_size =", "slice_lora_b"]),
        ("vllm.lora.layers.replicated_linear:ReplicatedLinearWithLoRA", ["self.output_size ="]),
        ("vllm.lora.layers.base:BaseLayerWithLoRA", ["self.punica_wrapper"]),
        ("vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase", ["self._token_lora_indices"]),
        (
            "vllm.lora.model_manager:LoRAModelManager",
            ["self.modules", "self.packed_modules", "self.lora_index_to_id", "self.model", "module.reset_lora(index)"],
        ),
        ("vllm.lora.worker_manager:WorkerLoRAManager", ["_manager_cls", "self._adapter_manager", "self.lora_config"]),
        (
            "vllm.lora.layers.column_parallel_linear:MergedColumnParallelLinearWithLoRA.set_lora",
            ["self.reset_lora(index)"],
        ),
        ("vllm.v1.engine.input_processor:InputProcessor", ["self.vllm_config", "self._validate_lora(lora_request)"]),
        ("vllm.v1.engine.llm_engine:LLMEngine", ["self.vllm_config"]),
        ("vllm.v1.engine.async_llm:AsyncLLM", ["self.vllm_config"]),
        ("vllm.model_executor.layers.linear:RowParallelLinear", ["self.input_is_parallel"]),
        (
            "vllm.model_executor.layers.linear:QKVParallelLinear",
            ["self.total_num_heads", "self.total_num_kv_heads", "self.head_size"],
        ),
    ],
)
def test_the_attributes_are_there(target: str, attributes: list[str]) -> None:
    text = source(target)
    assert [attribute for attribute in attributes if attribute not in text] == []


def test_signatures() -> None:
    weights = inspect.signature(names.lookup("LoRALayerWeights").__init__).parameters
    assert list(weights)[1:] == ["module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling"]
    assert list(inspect.signature(names.lookup("LoRAModel").__init__).parameters)[1:4] == [
        "lora_model_id",
        "rank",
        "loras",
    ]
    assert list(inspect.signature(names.lookup("parse_fine_tuned_lora_name")).parameters) == ["name", "weights_mapper"]
    from vllm.model_executor.models.utils import WeightsMapper

    assert hasattr(WeightsMapper, "get_rename_mapper") or hasattr(WeightsMapper, "get_unstacked_mapper")
