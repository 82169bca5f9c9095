"""One training from configuration to adapter: plan, train or resume, evaluate, save."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from doran_core.errors import ConfigError
from doran_core.files.atomic import new_directory
from doran_hf import LayerMetricsCallback, tau_by_layer
from doran_hf.layer_table import read_states
from doran_hf.peft_internals import load_checkpoint
from doran_hf.train.config import OWN_TRAINER_FIELDS, TrainConfig
from doran_hf.train.data import load_examples
from doran_hf.train.model_card import model_card
from doran_hf.train.recipe import Prepared, TaskRecipe
from doran_hf.train.rundir import RunDirectory
from doran_hf.train.tasks import recipe_for
from doran_hf.weight_decay import exempt_from_decay

__all__ = ["train"]


def train(config: TrainConfig, *, overwrite: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Train an adapter, or resume an interrupted run.

    Args:
        config: the configuration.
        overwrite: remove an earlier run in the output directory.
        dry_run: print the plan, train nothing and write nothing.

    Returns:
        The metrics, as in the run's metrics.json. A finished run returns its metrics and does not train again.

    Raises:
        DoranError: a fault in the configuration, the data or the base; the subclass and the message name it.
    """
    run = None if dry_run else RunDirectory(config, overwrite=overwrite)
    if run is not None and run.done and not overwrite:
        if not config.keep_checkpoints:  # of a run that was killed before it removed them
            run.remove_checkpoints()
        print(f"{run.path} is done; --overwrite trains again")
        return run.read("metrics.json") or {}
    set_seed(config.seed)
    recipe = recipe_for(config, load_examples(config.data, config.seed))
    prepared = recipe.prepare()
    model = _adapted(config, recipe)
    checkpoint = None if run is None or overwrite else run.last_checkpoint()
    with tempfile.TemporaryDirectory() as nowhere:  # a Trainer creates its directory even if it never trains
        try:
            trainer = _trainer(config, recipe, prepared, model, Path(nowhere) if run is None else run.checkpoints)
        except ConfigError:
            if run is not None:
                run.withdraw()
            raise
    print(_plan(config, prepared, model, trainer, checkpoint), flush=True)
    if run is None:
        return {}
    run.begin()
    LayerMetricsCallback(run.layers).attach(trainer)
    measured = prepared.held_out is not None
    if measured and config.evaluate_base and config.task == "causal-lm" and not run.read("base.json"):
        run.write("base.json", _evaluate(trainer, recipe, "evaluating the base"))
    set_seed(config.seed)
    loss, seconds = _train(trainer, checkpoint)
    metrics: dict[str, Any] = {"base": run.read("base.json") or {}} if config.evaluate_base else {}
    metrics["adapter"] = _evaluate(trainer, recipe, "evaluating the adapter") if measured else {}
    metrics["training"] = {
        "loss": loss,
        "steps": trainer.state.global_step,
        **dataclasses.asdict(prepared.counts["train"]),
        "seconds": round(seconds, 1),
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "trainable_parameters": _trainable(model),
    }
    if measured:
        metrics["held_out"] = dataclasses.asdict(prepared.counts["eval"])
    metrics["tau"] = {name: float(tau.mean()) for name, tau in tau_by_layer(model).items()}
    metrics["versions"] = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    if trainer.is_world_process_zero():
        _save(run, config, recipe, model, metrics)
    return metrics


def _train(trainer: Trainer, checkpoint: Path | None) -> tuple[float | None, float]:
    """Train, from the checkpoint if there is one; return mean loss and seconds."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        steps = trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps
        if state.global_step >= steps:  # Trainer would take one more step before it notices
            load_checkpoint(trainer, str(checkpoint))
            trainer.state = state
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            return (sum(losses) / len(losses) if losses else None), 0.0
    trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trained.training_loss, trained.metrics["train_runtime"]


def _adapted(config: TrainConfig, recipe: TaskRecipe) -> Any:
    model, adapter = recipe.model(), config.adapter_config()
    adapter.modules_to_save = recipe.trained_in_full(model) or None
    return get_peft_model(model, adapter)


def _trainer(config: TrainConfig, recipe: TaskRecipe, prepared: Prepared, model: Any, folder: Path) -> Trainer:
    values = OWN_TRAINER_FIELDS | config.trainer | {"output_dir": str(folder), "seed": config.seed}
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    values.setdefault("remove_unused_columns", config.task != "image-classification")
    values.setdefault("label_names", ["labels"])
    if config.task == "causal-lm":
        values.setdefault("prediction_loss_only", True)
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"trainer: {error}") from error
    if arguments.label_smoothing_factor and config.adapter_config().factor_penalty:
        raise ConfigError(
            "trainer.label_smoothing_factor: the model then returns no loss to which adapter.factor_penalty could be "
            "added; set only one of the two"
        )
    try:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=prepared.train,
            eval_dataset=prepared.held_out,
            data_collator=recipe.collator(),
            processing_class=recipe.processor,
            compute_metrics=recipe.compute_metrics,
        )
    except (ValueError, RuntimeError, ImportError) as error:  # incompatible settings, or a missing package
        raise ConfigError(f"trainer: {error}") from error
    exempt_from_decay(trainer)
    return trainer


def _plan(config: TrainConfig, prepared: Prepared, model: Any, trainer: Trainer, checkpoint: Path | None) -> str:
    arguments = trainer.args
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(1, arguments.world_size)
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * math.ceil(len(prepared.train) / batch))
    layers, trainable = tau_by_layer(model), _trainable(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    adapter = config.adapter_config()
    facts = {
        "task": config.task,
        "base": f"{config.base} ({type(model.get_base_model()).__name__}, {model.dtype}, on {arguments.device})",
        "train": f"{config.data.train}: {prepared.counts['train']}",
        "classes": prepared.classes,
        "eval": "none" if prepared.held_out is None else str(prepared.counts["eval"]),
        "an example": prepared.sample,
        "adapter": f"rank {adapter.rank}, tau {adapter.tau_kind}, factors {adapter.factors}, {len(layers)} layers",
        "in full": ", ".join(_in_full(model)) or None,
        "parameters": f"{trainable:,} of {total:,} train ({100 * trainable / total:.2f}%)",
        "steps": f"{steps} of {batch} examples, learning rate {arguments.learning_rate:g}",
        "output": config.output,
        "resuming": None if checkpoint is None else f"from {checkpoint.name}",
    }
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items() if value is not None)


def _in_full(model: Any) -> list[str]:
    base = model.get_base_model()
    return [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]


def _trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _evaluate(trainer: Trainer, recipe: TaskRecipe, label: str) -> dict[str, float]:
    found = trainer.evaluate()
    metrics = {name.removeprefix("eval_"): value for name, value in found.items() if name.startswith("eval_")}
    for name in ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"):
        metrics.pop(name, None)
    if recipe.config.task == "causal-lm":
        metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
    return metrics | recipe.evaluate(trainer.model, label)


def _save(
    run: RunDirectory,
    config: TrainConfig,
    recipe: TaskRecipe,
    model: Any,
    metrics: dict[str, Any],
) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md", "labels.json")
    with new_directory(run.adapter, overwrite=True, owned=names) as folder:
        model.save_pretrained(folder)
        recipe.processor.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(config, metrics, recipe.pad_token_id), encoding="utf-8")
        if recipe.class_names is not None:
            names_of_classes = json.dumps(recipe.class_names, ensure_ascii=False, indent=2) + "\n"
            (folder / "labels.json").write_text(names_of_classes, encoding="utf-8")
    run.write("metrics.json", metrics)
    if not config.keep_checkpoints:
        run.remove_checkpoints()
    rows = len(read_states(run.layers))  # also for a run that only had to be finished
    print(f"\nwrote {run.adapter}, {run.path / 'metrics.json'} and {run.layers} ({rows} rows)")
