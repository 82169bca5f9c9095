"""The model card of a trained adapter: what it is, how it was made, how well it does, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from doran_core.adapter.schema import created_by
from doran_hf.train.config import TrainConfig

__all__ = ["model_card"]

_LOADERS = {
    "causal-lm": ("AutoPeftModelForCausalLM", "text-generation"),
    "sequence-classification": ("AutoModelForSequenceClassification", "text-classification"),
    "image-classification": ("AutoModelForImageClassification", "image-classification"),
}

_CARD = """---
{header}---

# {title}

A [DoRAN](https://arxiv.org/abs/2510.04331) adapter for `{base}`, {task}, made with {made_by}.

## Load

```python
import doran_hf  # before loading: it makes PEFT know DoRAN; without it PEFT stops with KeyError: 'DORAN'
{loading}
```

`doran merge --base BASE --adapter DIR --out DIR` makes a plain checkpoint of it, which needs neither doran nor PEFT.

## Results

{results}

## Training

{training}

Settings that are not defaults:

```yaml
{settings}```
"""


def model_card(config: TrainConfig, metrics: Mapping[str, Any], pad_token_id: int | None = None) -> str:
    """The card as Markdown, with the metadata that the hub reads.

    Args:
        config: of the run.
        metrics: of the run.
        pad_token_id: the padding token for the configuration of a classifier that has none.
    """
    loader, pipeline = _LOADERS[config.task]
    header = {
        "base_model": config.base,
        "library_name": "peft",
        "pipeline_tag": pipeline,
        "tags": ["doran", "lora", f"base_model:adapter:{config.base}"],
    }
    facts = metrics["training"]
    source = Path(config.data.train)
    return _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        title=Path(config.output).resolve().name,
        base=config.base,
        task=config.task,
        made_by=created_by().replace("doran-core", "doran-hf with doran-core"),
        loading=_loading(config, loader, pad_token_id),
        results=_results(metrics),
        training=f"{facts['steps']} steps on {facts['examples']:,} examples of `{source.name or source}`, "
        f"{facts['trainable_parameters']:,} trained parameters, {_mean_loss(facts)}seed {config.seed}.",
        settings=yaml.safe_dump(_settings(config), sort_keys=False, allow_unicode=True),
    )


def _mean_loss(facts: dict[str, Any]) -> str:
    """Empty if no loss was logged, as in a run that was killed right after its last step."""
    return "" if facts["loss"] is None else f"mean loss {facts['loss']:.4f}, "


def _loading(config: TrainConfig, loader: str, pad_token_id: int | None) -> str:
    if config.task == "causal-lm":
        return f'from peft import {loader}\n\nmodel = {loader}.from_pretrained("this-directory")'
    padding = "" if pad_token_id is None else f"base.config.pad_token_id = {pad_token_id}\n"
    return (
        "import json\nfrom pathlib import Path\n\n"
        f"from peft import PeftModel\nfrom transformers import {loader}\n\n"
        'names = json.loads(Path("this-directory/labels.json").read_text("utf-8"))\n'
        f"base = {loader}.from_pretrained(\n"
        f"    {config.base!r}, num_labels=len(names), id2label=dict(enumerate(names)), ignore_mismatched_sizes=True\n"
        f")\n{padding}"
        'model = PeftModel.from_pretrained(base, "this-directory")'
    )


def _results(metrics: Mapping[str, Any]) -> str:
    base, adapter = metrics.get("base") or {}, metrics.get("adapter") or {}
    names = [name for name, value in adapter.items() if isinstance(value, float) and name != "epoch"]
    if not names:
        return "Not evaluated: no examples were held out."
    rows = [f"| {name} | {_number(base.get(name))} | {_number(adapter[name])} |" for name in names]
    return "\n".join(["| on the held-out examples | base | this adapter |", "|---|---|---|", *rows]) + _of(metrics)


def _of(metrics: Mapping[str, Any]) -> str:
    """A note on evaluation examples that were cut or left out."""
    counts = metrics.get("held_out") or {}
    cut, left_out = counts.get("cut", 0), counts.get("left_out", 0)
    if not cut and not left_out:
        return ""
    return (
        f"\n\nOf {counts['examples'] + left_out} examples {cut} were cut to the longest length, and {left_out} "
        "were left out of the loss, since nothing to learn remained of them."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The user's settings, with paths shortened to names."""
    defaults = type(config.data)(train="-")
    data = {name: value for name, value in vars(config.data).items() if value != getattr(defaults, name)}
    for name in ("train", "eval"):
        if data.get(name):
            data[name] = Path(data[name]).name
    return {"seed": config.seed, "data": data, "adapter": config.adapter, "trainer": config.trainer}
