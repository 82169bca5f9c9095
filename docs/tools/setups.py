"""What the pages' code blocks find in their folder: small models of real architectures, data, and adapters of theirs.

Each page names the pieces it needs in PAGES; a piece is made once and copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import nn

__all__ = ["PAGES", "prepare"]

WORDS = "Review : Sentiment a joy from start to end two lost hours quiet triumph . positive negative answer"


def prepare(page: str, folder: Path) -> dict[str, Any]:
    """Put what a page needs into the folder in which its blocks run; return the names that the reader is to have."""
    for name in PAGES.get(page, ()):
        made = _made(name)
        (shutil.copytree if made.is_dir() else shutil.copy)(made, folder / made.name)
    return _readers_own(folder) if page == "README.md" else {}


def _readers_own(folder: Path) -> dict[str, Any]:
    """model, batches and loss of a loop, and what a Trainer takes, for the README's short examples."""
    from transformers import LlamaForCausalLM, TrainingArguments

    ids = torch.randint(3, 90, (4, 8))
    return {
        "model": LlamaForCausalLM.from_pretrained(folder / "base"),
        "batches": [(ids, ids)],
        "loss": lambda output, y: nn.functional.cross_entropy(output.logits.flatten(0, 1), y.flatten()),
        "arguments": TrainingArguments(str(folder / "run"), max_steps=2, report_to=[], save_strategy="no"),
        "data": [{"input_ids": row, "labels": row} for row in ids],
        "input_ids": ids,
    }


@cache
def _made(name: str) -> Path:
    folder = Path(mkdtemp(prefix="doran-docs-"))
    torch.manual_seed(0)
    return _PIECES[name](folder / name)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<eos>", *dict.fromkeys(WORDS.split())]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)


def _llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=100, max_position_embeddings=256, num_key_value_heads=2, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _bert(folder: Path) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes)
    ViTForImageClassification(config).save_pretrained(folder, save_original_format=False)
    return folder


def _adapter(base: str, auto: str, targets: list[str], seed: int = 0) -> Callable[[Path], Path]:
    """A DoRAN adapter of a base, moved away from its start."""

    def make(folder: Path) -> Path:
        import transformers

        from doran_core import DoranConfig, adapt

        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, auto).from_pretrained(_made(base))
        handle = adapt(model, DoranConfig(rank=4, target_modules=targets))
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return handle.save(folder, base_model=base)

    return make


def _lora(folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(_made("base")), config).save_pretrained(folder)
    return folder


def _adapters(folder: Path) -> Path:
    for seed, name in enumerate(("sentiment", "critic")):
        _adapter("base", "AutoModelForCausalLM", ["q_proj", "v_proj"], seed)(folder / name)
    return folder


def _rows(file: Path) -> Path:
    rows = [
        {"text": "a joy from start to end .", "label": 1, "sentiment": "positive"},
        {"text": "two lost hours .", "label": 0, "sentiment": "negative"},
    ]
    file = file.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in 16 * rows))
    return file


def _sentences(file: Path) -> Path:
    file = file.with_suffix(".txt")
    file.write_text("a joy from start to end\ntwo lost hours\n")
    return file


_PIECES: dict[str, Callable[[Path], Path]] = {
    "base": _llama,
    "adapter": _adapter("base", "AutoModelForCausalLM", ["q_proj", "v_proj"]),
    "lora": _lora,
    "adapters": _adapters,
    "train": _rows,
    "test": _rows,
    "sentences": _sentences,
    "encoder": _bert,
    "encoder-adapter": _adapter("encoder", "AutoModelForSequenceClassification", ["query", "value"]),
    "vit": _vit,
    "vit-adapter": _adapter("vit", "AutoModelForImageClassification", ["q_proj", "v_proj"]),
}

PAGES: dict[str, tuple[str, ...]] = {
    "README.md": ("base",),
    "docs/howto/inspect.md": ("base", "adapter"),
    "docs/howto/merge.md": ("base", "adapter", "lora"),
    "docs/howto/onnx.md": ("base", "adapter", "encoder", "encoder-adapter", "vit", "vit-adapter", "sentences"),
    "docs/howto/onnx-adapters.md": ("base", "adapter", "lora"),
    "docs/howto/quantized.md": ("base",),
    "docs/howto/trainer.md": ("base", "train"),
    "docs/howto/vllm.md": ("base", "adapters"),
    "docs/reference/adapter-format.md": ("base", "adapter"),
    "docs/start/ten-minutes.md": ("base", "train", "test"),
    "packages/doran-core/README.md": ("base", "adapter"),
}
