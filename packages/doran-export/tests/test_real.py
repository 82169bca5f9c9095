"""The three examples on real weights and real inputs: a text classifier, an image classifier, a language model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import labelled_sentences
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTConfig, ViTForImageClassification

from doran_export import OnnxRunner, export

_TOPICS = ["the sea", "love", "war", "school", "money", "music", "cooking", "snow"]
_TOPICS += ["trains", "doctors", "robots", "Paris", "dogs", "chess", "rain", "books"]
PROMPTS = [
    *(f"Write one sentence about {topic}:" for topic in _TOPICS),
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Review: a warm, funny, engaging film.\nSentiment:",
]


def test_text_classifier(minilm_classifier: Path, sentences: list[str], tmp_path: Path) -> None:
    report = export(minilm_classifier, tmp_path / "out", inputs=sentences)
    given = [check for check in report.proof.checks if check.name.startswith("given")]

    assert sum(check.compared for check in given) == 500
    assert report.proof.max_difference < 1e-3
    assert sum(check.same_argmax * check.compared for check in given if check.same_argmax is not None) >= 0.99 * 500

    runner = OnnxRunner(tmp_path / "out")
    texts, labels = zip(*labelled_sentences(1000)[1::9], strict=True)
    batch = runner.tokenizer(list(texts), padding=True, return_tensors="np")
    accuracy = (runner.run(dict(batch))["logits"].argmax(-1) == np.array(labels)).mean()
    assert accuracy > 0.6  # it has learned something, so that the comparison above is about a real classifier


def test_image_classifier(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    digits = datasets.load_digits()
    images = (digits.images[:, None].astype(np.float32) - 8) / 8
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=96,
        initializer_range=0.2,
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.from_numpy(images[:1297]), torch.from_numpy(digits.target[:1297])
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(64):
            model(pixel_values=x[rows], labels=y[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")

    held_out = images[1297:]
    report = export(tmp_path / "model", tmp_path / "out", inputs=[{"pixel_values": held_out}])
    check = report.proof.checks[-1]
    assert (check.name, check.compared) == ("given arrays 1", 500)
    assert report.proof.max_difference < 1e-3
    assert check.same_argmax is not None
    assert check.same_argmax >= 0.99
    logits = OnnxRunner(tmp_path / "out").run({"pixel_values": held_out})["logits"]
    assert (logits.argmax(-1) == digits.target[1297:]).mean() > 0.8


def test_language_model(smollm2: Path, tmp_path: Path) -> None:
    report = export(smollm2, tmp_path / "out", inputs=PROMPTS)
    (greedy,) = report.proof.greedy
    assert (greedy.prompts, greedy.steps, greedy.identical) == (20, 64, 20)
    given = [check for check in report.proof.checks if check.name.startswith("given")]
    assert given
    assert all(check.max_difference["logits"] < 1e-3 for check in given)

    runner = OnnxRunner(tmp_path / "out")
    assert "Paris" in runner.generate_text(["The capital of France is"], max_new_tokens=4)[0]

    # What the end-to-end demo asks of it: the logits at the last position, of several prompts of different lengths.
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    texts = [f"Review: {text}\nSentiment:" for text, _ in labelled_sentences(8)]
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        expected = model(**batch, position_ids=positions, logits_to_keep=1).logits[:, -1].numpy()
    got = runner.run({name: array.numpy() for name, array in batch.items()})["logits"][:, -1]
    assert np.abs(got - expected).max() < 1e-3
