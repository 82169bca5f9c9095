"""Tied embeddings: a checkpoint without an output layer's weight, because the input embedding's stands for it."""

from __future__ import annotations

from doran_core.checkpoint.checkpoint import Checkpoint

__all__ = ["FLAG_IN_FORWARD", "OUTPUT_KEY", "tied_embedding"]

OUTPUT_KEY = "lm_head.weight"
"""transformers' name of the output layer in causal language models."""

FLAG_IN_FORWARD = frozenset(
    ("longt5", "mt5", "pop2piano", "switch_transformers", "t5", "t5gemma", "t5gemma_module", "udop", "umt5")
)
"""transformers' model types that also scale or choose their outputs by ``tie_word_embeddings``, or by a field made of
it: the flag must stay as it is there, whatever is tied."""

_INPUT_KEYS = tuple(
    f"{name}.weight" for name in ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
)


def tied_embedding(checkpoint: Checkpoint) -> str | None:
    """The input embedding's key, if this is a causal language model whose output layer it is too; else None."""
    config = checkpoint.config()
    names = config.get("architectures") or []
    causal = any(isinstance(name, str) and name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if not causal or OUTPUT_KEY in checkpoint or not config.get("tie_word_embeddings", True):
        return None
    found = [key for key in checkpoint if key.endswith(_INPUT_KEYS)]
    return found[0] if len(found) == 1 else None
