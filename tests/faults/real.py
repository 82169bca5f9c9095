"""A tiny language model, and on it the real steps of `doran train` and `doran export`, to be killed in the middle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from legal import meaning

__all__ = ["export_contents", "export_once", "train_contents", "train_once", "write_model"]

_WORDS = ["<pad>", "<unk>", "<eos>", "good", "bad", *"abcdefgh"]


def write_model(folder: Path) -> None:
    """A base model with a tokenizer, texts, and an adapter that was trained on them; all is imported then."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    config = LlamaConfig(vocab_size=16, num_key_value_heads=2, max_position_embeddings=32, **sizes, **ends)
    LlamaForCausalLM(config).save_pretrained(folder / "text-base")
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=32
    ).save_pretrained(folder / "text-base")
    rows = [{"text": letter, "label": "good" if letter in "abcd" else "bad"} for letter in "abcdefgh"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_once(folder, folder / "trained")
    export_once(folder, folder / "exported")


def train_once(legal: Path, target: Path) -> None:
    """A run of four steps with a checkpoint after each second one."""
    from doran_hf.train import load_config, train

    values: dict[str, Any] = {
        "base": str(legal / "text-base"),
        "output": str(target),
        "data.train": str(legal / "rows.jsonl"),
        "data.eval": str(legal / "rows.jsonl"),
        "data.prompt": "{text}",
        "data.completion": " {label}",
        "adapter.rank": 2,
        "trainer.max_steps": 4,
        "trainer.save_steps": 2,
        "trainer.logging_steps": 1,
        "trainer.disable_tqdm": True,
        "trainer.use_cpu": True,
    }
    train(load_config(None, values))


def train_contents(run: Path) -> dict[str, str] | None:
    """What a run holds, but for times; None while there is more to do. An adapter is there whole, or not at all."""
    adapter = meaning(run / "adapter") if (run / "adapter").exists() else ""
    if not (run / "metrics.json").exists() or (run / "checkpoints").exists():
        return None
    metrics = json.loads((run / "metrics.json").read_text())
    kept = {name: metrics[name] for name in ("base", "adapter", "tau") if name in metrics}
    return {"adapter": adapter, "metrics": json.dumps(kept, sort_keys=True), "files": _names(run)}


def export_once(legal: Path, target: Path) -> None:
    """A merged graph, proven in ONNX Runtime."""
    from doran_export import export

    export(out=target, base=legal / "text-base", adapter=legal / "trained" / "adapter", exporter="torch")


def export_contents(folder: Path) -> dict[str, str] | None:
    """The graph's bytes and the names of all files."""
    graph = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    return {"graph": graph, "files": _names(folder)}


def _names(folder: Path) -> str:
    return " ".join(sorted(str(path.relative_to(folder)) for path in folder.rglob("*")))
