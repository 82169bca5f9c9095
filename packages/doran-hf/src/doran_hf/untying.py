"""Unties weights of a merged model where one end of a tie now has a merged weight of its own."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from doran_core.checkpoint.ties import FLAG_IN_FORWARD

__all__ = ["keep_untied"]


def keep_untied(model: nn.Module) -> None:
    """Make a merged model save and load both ends of a tie that merging has broken.

    transformers' flag ``tie_word_embeddings`` stands for all ties of a model. So this function clears the flag, and
    gives each tied parameter memory of its own, so that the checkpoint stores all of them. In models whose outputs
    depend on the flag, the flag stays: transformers does not tie two stored tensors that differ.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    broken = {tied for tied, source in ties.items() if _tensor(model, tied) is not _tensor(model, source)}
    if not broken:
        return
    if any(getattr(config, "model_type", None) in FLAG_IN_FORWARD for config in _configs(model)):
        _set_ties(model, {tied: source for tied, source in ties.items() if tied not in broken})
        for config in _configs(model):  # PEFT has cleared the flag of the outermost one
            if config.model_type in FLAG_IN_FORWARD:
                config.tie_word_embeddings = True
        return
    for tied in ties.keys() - broken:
        place, _, name = tied.rpartition(".")
        own = copy.deepcopy(_tensor(model, tied))
        setattr(model.get_submodule(place), name, own)
    _set_ties(model, {})
    for config in _configs(model):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _tensor(model: nn.Module, name: str) -> Any:
    """The parameter or buffer of this name."""
    place, _, own = name.rpartition(".")
    return getattr(model.get_submodule(place), own)


def _set_ties(model: Any, ties: dict[str, str]) -> None:
    model.all_tied_weights_keys = ties


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model and of the models in it."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if hasattr(config, "model_type")}.values())
