"""The README's examples, run as written but for the base model, which is a tiny one made here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import make_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

README = Path(__file__).parents[1] / "README.md"
WORDS = "Review : a joy from start to end . Sentiment positive two lost hours negative"


def save_tiny_base(folder: Path) -> None:
    make_llama().save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<eos>", *dict.fromkeys(WORDS.split())])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base"), names)
    assert (tmp_path / "sentiment" / "adapter_model.safetensors").exists()
    assert "plain" in names
