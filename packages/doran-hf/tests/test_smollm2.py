"""The real SmolLM2: an adapter starts at the base to the bit in half precision, and comes back from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import disturb
from peft import PeftModel, get_peft_model
from smollm2 import FILE, load_model, package_folder
from transformers import AutoTokenizer

from doran_hf import DoranConfig
from doran_hf.train.config import DataConfig
from doran_hf.train.text import IGNORED, TextEncoder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(package_folder(), gguf_file=FILE)


@torch.no_grad()
def test_starts_at_the_base_and_comes_back(tokenizer: Any, tmp_path: Path) -> None:
    ids = tokenizer("Review: a film to remember\nSentiment:", return_tensors="pt").input_ids
    model = load_model(torch.bfloat16)
    expected = model(ids).logits
    model = get_peft_model(model, DoranConfig(rank=16, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    assert torch.equal(model(ids).logits, expected)
    disturb(model, size=0.5)
    adapted = model(ids).logits
    assert (adapted - expected).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, adapter_name="other").eval()
    assert torch.equal(loaded(ids).logits, adapted)


def test_its_chats_are_learned_turn_by_turn(tokenizer: Any) -> None:
    encode = TextEncoder(DataConfig(train="-"), tokenizer, ["messages"])
    turns = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi, how can I help?"},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4."},
    ]
    encoded = encode({"messages": turns})
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(turns, tokenize=False)
    learned = tokenizer.decode([label for label in encoded["labels"] if label != IGNORED])
    assert learned == "Hi, how can I help?<|im_end|>\n4.<|im_end|>\n"
