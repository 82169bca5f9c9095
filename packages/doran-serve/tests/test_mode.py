"""What merged mode cannot be combined with is said before an engine serves with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from doran_core.errors import DoranError
from doran_serve.merged.mode import is_merged, merged_options


def config(**changes: Any) -> Any:
    """As much of a VllmConfig as is asked about."""
    return SimpleNamespace(
        additional_config=changes.get("additional_config", merged_options()),
        lora_config=changes.get("lora_config"),
        model_config=SimpleNamespace(quantization=changes.get("quantization")),
        parallel_config=SimpleNamespace(data_parallel_size=changes.get("data_parallel_size", 1)),
    )


def test_mode() -> None:
    assert is_merged(config())
    assert not is_merged(config(additional_config={}))
    assert not is_merged(config(additional_config={}, lora_config=object(), quantization="fp8"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"additional_config": {"doran_mode": "mixd"}}, "doran_mode='mixd', expected 'merged'"),
        ({"lora_config": object()}, "leave out enable_lora"),
        ({"quantization": "awq"}, "quantized by 'awq'"),
        ({"data_parallel_size": 2}, "data-parallel"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DoranError, match=message):
        is_merged(config(**changes))
