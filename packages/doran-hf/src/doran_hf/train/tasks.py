"""The training tasks by name."""

from __future__ import annotations

from doran_hf.train.causal_lm import CausalLM
from doran_hf.train.classification import ImageClassification, SequenceClassification
from doran_hf.train.config import TrainConfig
from doran_hf.train.data import Examples
from doran_hf.train.recipe import TaskRecipe

__all__ = ["recipe_for"]


def recipe_for(config: TrainConfig, examples: Examples) -> TaskRecipe:
    """The recipe of the configuration's task."""
    recipes: dict[str, type[TaskRecipe]] = {
        "causal-lm": CausalLM,
        "sequence-classification": SequenceClassification,
        "image-classification": ImageClassification,
    }
    return recipes[config.task](config, examples)
