"""A small ViT pretrained on letters that are rendered from fonts, and scikit-learn's handwritten digits to adapt it to.

Letters and digits are 8x8 pixels. No digit is among the letters.
"""

from __future__ import annotations

import os
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import Examples, Split

__all__ = ["digits_split", "pretrained_vit", "render_letters"]

CLASSES = string.ascii_uppercase + "abdefghnqrt"
"""Capital letters, and the small ones that do not look like their capitals."""
SIDE, DRAWN = 8, 64
PRETRAINING_STEPS, PRETRAINING_BATCH, RATE = 3000, 128, 1e-3
GLYPHS_PER_CLASS = 400
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
"""Families of fonts, by the start of their files' names; matplotlib ships them, so every machine has the same."""
FILE = "vit-letters.safetensors"


def font_files() -> list[Path]:
    """Text fonts with Latin letters: regular, bold, italic and both, of each family."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(
        path for path in folder.glob("*.ttf") if path.stem.startswith(FONTS) and not path.stem.endswith("Display")
    )


def render_letters(per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Letters in random fonts, sizes, places and angles, blurred to 8x8.

    Returns:
        Images ``[N, 1, 8, 8]`` in [0, 1] and labels ``[N]``.
    """
    from PIL import Image, ImageDraw, ImageFont

    random = np.random.default_rng(seed)
    fonts = [ImageFont.truetype(str(path), 44) for path in font_files()]
    images, labels = [], []
    for label, letter in enumerate(CLASSES):
        for _ in range(per_class):
            image = Image.new("L", (DRAWN, DRAWN))
            place = random.normal(DRAWN / 2, 3.0, size=2)
            font: Any = fonts[random.integers(len(fonts))]
            ImageDraw.Draw(image).text(tuple(place), letter, fill=255, font=font, anchor="mm")
            image = image.rotate(random.normal(0.0, 10.0), resample=Image.Resampling.BILINEAR)
            image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
            pixels = np.asarray(image, dtype=np.float32) / 255.0
            images.append(pixels / max(float(pixels.max()), 1e-3))
            labels.append(label)
    return torch.tensor(np.stack(images))[:, None], torch.tensor(labels)


def vit_config() -> Any:
    """4 blocks of width 64 on patches of 2x2: 0.2 million weights."""
    from transformers import ViTConfig

    return ViTConfig(
        image_size=SIDE, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def pretrain(steps: int, seed: int = 0) -> tuple[nn.Module, float]:
    """Train the ViT to tell letters apart.

    Returns:
        The model without its classifier, and its accuracy on letters that it has not seen.
    """
    from transformers import ViTModel

    torch.manual_seed(seed)
    model = ViTModel(vit_config(), add_pooling_layer=False)
    head = nn.Linear(64, len(CLASSES))
    images, labels = render_letters(GLYPHS_PER_CLASS, seed)
    held_out = torch.randperm(len(labels))[: len(labels) // 10]
    seen = torch.ones(len(labels), dtype=torch.bool)
    seen[held_out] = False
    pool = seen.nonzero()[:, 0]
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        batch = pool[torch.randint(len(pool), (PRETRAINING_BATCH,))]
        loss = F.cross_entropy(head(model(pixel_values=images[batch]).last_hidden_state[:, 0]), labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        guesses = head(model.eval()(pixel_values=images[held_out]).last_hidden_state[:, 0]).argmax(1)
    return model, float((guesses == labels[held_out]).float().mean())


def pretrained_vit(cache: Path, steps: int = PRETRAINING_STEPS) -> Any:
    """The pretrained ViT from ``cache``, where it is put after the first pretraining, of so many steps."""
    from safetensors.torch import load_file, save_file
    from transformers import ViTModel

    file = cache / FILE
    if not file.is_file():
        model, accuracy = pretrain(steps)
        print(f"pretrained the ViT on letters: accuracy {accuracy:.3f} on unseen ones", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file(model.state_dict(), str(part), metadata={"letters_accuracy": f"{accuracy:.4f}"})
        part.rename(file)
    model = ViTModel(vit_config(), add_pooling_layer=False)
    model.load_state_dict(load_file(str(file)))
    return model


def digits_split() -> Split:
    """1,000 handwritten digits to train on, 297 for validation and 500 for the test."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 16.0
    labels = torch.tensor(data.target[order])
    parts = (slice(797, None), slice(0, 297), slice(297, 797))
    return Split.of(*(Examples(images[part], None, labels[part]) for part in parts))
