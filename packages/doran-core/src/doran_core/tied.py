"""Tied embeddings: a checkpoint without an output layer's weight, because the input embedding's stands for it."""

from __future__ import annotations

from doran_core.checkpoint import Checkpoint

__all__ = ["OUTPUT_KEY", "input_embedding_key", "is_tied"]

OUTPUT_KEY = "lm_head.weight"
"""transformers' name of the output layer in causal language models."""

_INPUT_NAMES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether this is a causal language model whose output layer is the input embedding."""
    config = checkpoint.config()
    names = config.get("architectures") or []
    has_head = any(isinstance(name, str) and name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    tied = bool(config.get("tie_word_embeddings", True))
    return has_head and tied and OUTPUT_KEY not in checkpoint and input_embedding_key(checkpoint) is not None


def input_embedding_key(checkpoint: Checkpoint) -> str | None:
    """The input embedding's weight, if exactly one tensor has one of its usual names."""
    found = [key for key in checkpoint if key.endswith(tuple(f"{name}.weight" for name in _INPUT_NAMES))]
    return found[0] if len(found) == 1 else None
