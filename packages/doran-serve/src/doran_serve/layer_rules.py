"""Decides which layers of a base a served adapter may change, from the base's files; asks vLLM's model class if there.

vLLM adapts linear layers, and with LoRA also embeddings, the output head and experts. Only linear layers can have the
output scale of DoRA and DoRAN. These rules predict the engine's verdict before it starts; the engine decides.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

from doran_core.checkpoint.checkpoint import Checkpoint
from doran_serve.vllm_symbols import lookup

__all__ = ["LayerRules", "ServedAs"]

ServedAs = Literal["linear", "embedding", "output head", "classification head", "experts", "another tower"]
"""How vLLM serves a layer."""

_TOWERS = ("vision_config", "audio_config")
"""Sections of a configuration that show other parts than the language model."""


class LayerRules:
    """The rules for one base.

    Args:
        checkpoint: the base's files; without them only names decide.
    """

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        config: Mapping[str, Any] = {} if checkpoint is None else checkpoint.config()
        text = config.get("text_config")
        self._vocabulary = (text if isinstance(text, dict) else config).get("vocab_size")
        labels = config.get("id2label")
        self._labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
        architectures = config.get("architectures")
        self._architectures = [str(name) for name in architectures] if isinstance(architectures, list) else []
        self._classifies = any("Classification" in name for name in self._architectures)
        self._language: str | None = None
        if checkpoint is not None and any(section in config for section in _TOWERS):
            self._language = next((k.partition("embed_tokens")[0] for k in checkpoint if "embed_tokens" in k), None)

    def served_as(self, name: str, rows: int, kind: str | None) -> ServedAs:
        """How vLLM serves a layer.

        Args:
            name: of the module, in the checkpoint if the checkpoint has it.
            rows: d_out; of an embedding, d_out of its transpose.
            kind: how the base keeps the weight, if the adapter records it.
        """
        parts = name.split(".")
        if self._language is not None and not name.startswith(self._language) and "language_model" not in parts:
            return "output head" if self._is_head(parts, rows) else "another tower"
        if kind == "embedding":
            return "embedding"
        if "experts" in parts:
            return "experts"
        if self._classifies and not any(part.isdigit() for part in parts) and rows == self._labels:
            return "classification head"
        return "output head" if self._is_head(parts, rows) else "linear"

    def _is_head(self, parts: list[str], rows: int) -> bool:
        """Whether a layer outside the numbered blocks maps to the vocabulary."""
        if any(part.isdigit() for part in parts):
            return False
        return parts[-1] == "lm_head" or (self._vocabulary is not None and rows == self._vocabulary)

    def stock_adapts(self, name: str) -> bool:
        """Whether vLLM's model of this base takes a LoRA on its embedding or output head `name`.

        Without vLLM the answer is yes, and the engine decides later.
        """
        if importlib.util.find_spec("vllm") is None:
            return True
        for architecture in self._architectures:
            model = lookup("ModelRegistry").models.get(architecture)
            if model is not None:
                return name.rpartition(".")[2] in model.load_model_cls().embedding_modules
        return True
