"""An image classifier: a ViT that reads digits, and a DoRAN adapter that teaches it to read them as negatives.

    python image_classifier.py [--work DIR]

Trains a small ViT on scikit-learn's handwritten digits, then an adapter for inverted ones, exports base and adapter as
one merged ONNX model in float32 and float16, and compares with PyTorch on 500 images that were not trained on. Needs
scikit-learn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from comparison import Agreement, command_line, compare, train
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from doran_core import DoranConfig, adapt
from doran_export import OnnxRunner, export

COMPARED, BATCH = 500, 64


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images ``[1797, 1, 8, 8]`` from -1 to 1, and their labels."""
    data = load_digits()
    return (data.images[:, None].astype(np.float32) - 8) / 8, data.target


def fit(model: ViTForImageClassification, images: np.ndarray, labels: np.ndarray, epochs: int, rate: float) -> None:
    """Train what is trainable in a model."""
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    rows = [batch for _ in range(epochs) for batch in torch.randperm(len(x)).split(BATCH)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(rows, lambda batch: model(pixel_values=x[batch], labels=y[batch]).loss, [{"params": parameters, "lr": rate}])


def run(work: Path) -> dict[str, Agreement]:
    """Train, export and compare; by precision."""
    torch.manual_seed(0)
    images, labels = digits()
    negatives, trained = -images, len(images) - COMPARED
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
    fit(model, images[:trained], labels[:trained], epochs=8, rate=1e-3)
    model.eval().save_pretrained(work / "base")

    handle = adapt(model, DoranConfig(rank=8, target_modules="all-linear", exclude_modules=["classifier"]))
    fit(model, negatives[:trained], labels[:trained], epochs=6, rate=5e-3)
    handle.save(work / "adapter")
    held_out = negatives[trained:]
    with torch.inference_mode():
        expected = model(pixel_values=torch.from_numpy(held_out)).logits.numpy()

    results = {}
    for precision in ("fp32", "fp16"):
        out = work / f"onnx-{precision}"
        export(base=work / "base", adapter=work / "adapter", out=out, precision=precision)
        got = OnnxRunner(out).run({"pixel_values": held_out})["logits"]
        results[precision] = compare(expected, got, labels[trained:].tolist())
    return results


if __name__ == "__main__":
    assert __doc__ is not None
    command_line(__doc__, run)
