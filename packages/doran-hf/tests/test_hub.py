"""The ordinary calls to and from a hub, with a folder in the hub's place: what is uploaded goes to the cache's layout.

Uploading is intercepted at the last call, HfApi.create_commit; loading is not touched at all, but offline.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import disturb, logits, make_llama
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from doran_hf import DoranConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = Path(constants.HF_HUB_CACHE)

    class Created:
        def __init__(self, repo_id: str) -> None:
            self.repo_id = repo_id

    def create_repo(self: Any, repo_id: str, **options: Any) -> Created:
        return Created(repo_id)

    def create_commit(self: Any, repo_id: str, operations: Sequence[Any], **options: Any) -> None:
        folder = cache / f"models--{repo_id.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(COMMIT)
        for operation in operations:
            target = folder / "snapshots" / COMMIT / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, target)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    return cache


def test_pushed_and_loaded_by_name(hub: Path) -> None:
    make_llama().push_to_hub("someone/base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("someone/base"), DoranConfig(task_type="CAUSAL_LM"))
    disturb(model)
    expected = logits(model)
    model.push_to_hub("someone/adapter")
    assert list(hub.glob("models--someone--adapter/snapshots/*/adapter_model.safetensors"))

    assert isinstance(PeftConfig.from_pretrained("someone/adapter"), DoranConfig)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("someone/base"), "someone/adapter")
    assert torch.equal(logits(loaded), expected)
    auto = AutoPeftModelForCausalLM.from_pretrained("someone/adapter", adapter_name="mine")
    assert torch.equal(logits(auto), expected)
    # transformers' own loader takes the tensors as they lie in the file: equal but for the order of sums.
    plain = AutoModelForCausalLM.from_pretrained("someone/base")
    plain.load_adapter("someone/adapter")
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
