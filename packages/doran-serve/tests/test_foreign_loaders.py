"""Frameworks, such as verl, that hand vLLM an adapter's tensors or put a loader of their own in place of this one."""

from __future__ import annotations

from enum import StrEnum
from types import SimpleNamespace
from typing import Any

import pytest

from doran_core.errors import AdapterFormatError, DoranError
from doran_serve.worker import prepare_adapters, with_doran_loading


class Stock:
    """vLLM's worker manager, as far as these tests go."""

    def _load_adapter(self, lora_request: Any) -> str:
        return f"vLLM loads {lora_request.lora_name}"


class Kind(StrEnum):
    """PEFT's own is such an enumeration."""

    DORAN = "DORAN"
    LORA = "LORA"


def manager() -> Any:
    return object.__new__(with_doran_loading(Stock, object))


@pytest.mark.parametrize("config", [{"peft_type": "DORAN"}, {"peft_type": Kind.DORAN}, {"use_dora": True}])
def test_tensors_of_a_doran_or_dora_adapter_are_refused(config: dict[str, Any]) -> None:
    request = SimpleNamespace(lora_name="policy", lora_tensors={}, peft_config=config)
    with pytest.raises(
        AdapterFormatError, match=r"another package \(such as verl\).*use doran_serve.reload_adapter"
    ) as e:
        manager()._load_adapter(request)
    assert "\n" not in str(e.value)


def test_tensors_of_a_lora_go_to_the_package_s_own_loader() -> None:
    request = SimpleNamespace(
        lora_name="policy", lora_tensors={}, peft_config={"peft_type": Kind.LORA, "use_dora": False}
    )
    assert manager()._load_adapter(request) == "vLLM loads policy"


def test_a_loader_in_place_of_ours_is_named() -> None:
    replaced = manager()
    type(replaced)._load_adapter = lambda self, lora_request: None  # as verl's hijack does, on whatever class it finds
    for found in (replaced, Stock()):
        worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=found))
        with pytest.raises(
            DoranError, match=r"another package has replaced vLLM's adapter loading.*would lose their scales"
        ):
            prepare_adapters(worker, [])
