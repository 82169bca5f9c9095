"""The README's examples, run as written but for the base model, which is a tiny one made here."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from conftest import make_llama
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from doran_hf.config import _FROM_LORA, _LORA_WITHOUT_EFFECT

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


def test_the_migration_page_names_every_field_of_lora() -> None:
    """And says of each what `from_lora` does: carries it over, takes it without effect, or refuses it."""
    page = (Path(__file__).parents[3] / "docs" / "migrating.md").read_text(encoding="utf-8")
    internal = {"peft_type", "auto_mapping", "peft_version", "runtime_config", "megatron_core", "qalora_group_size"}
    merged_rows = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # in the row of init_lora_weights
    table = page.partition("## Line by line")[2].partition("\n## ")[0]
    for entry in dataclasses.fields(LoraConfig):
        if entry.name in internal | merged_rows:
            continue
        rows = [line for line in table.splitlines() if line.startswith("|") and f"`{entry.name}" in line.split("|")[1]]
        assert rows, entry.name
        refused = any("refused" in line for line in rows)
        assert refused == (entry.name not in _FROM_LORA and entry.name not in _LORA_WITHOUT_EFFECT), entry.name
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, object] = {"model": make_llama()}
    for block in code:
        exec(block, names)
    assert get_peft_model is names["get_peft_model"]
    assert names["config"].rank == 16  # type: ignore[attr-defined]
