"""Reads a Hugging Face directory strictly: missing or unknown weights are an error, never random values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.errors import CheckpointError
from doran_core.files.opening import named_errors
from doran_export.errors import UnsupportedModelError
from doran_export.files import read_json
from doran_export.tasks import Task, task_for

__all__ = ["Source", "load_model", "load_tokenizer", "load_weights", "open_source", "traceable_experts"]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Source:
    """An inspected model directory, whose weights are not read yet."""

    path: Path
    config: PreTrainedConfig
    task: Task

    @property
    def architecture(self) -> str:
        """Name of the architecture in config.json, or else the model type."""
        names = self.config.architectures
        return str(names[0]) if names else str(self.config.model_type)


def open_source(path: Path, task: str | None = None) -> Source:
    """Read the configuration of a model directory and find its task.

    Raises:
        CheckpointError: the directory, its config.json or its safetensors weights are missing or broken.
        UnsupportedModelError: transformers or this package has no exporter for the model.
        ConfigError: `task` is not a known name.
    """
    _require_files(path)
    with named_errors(path, CheckpointError):
        return _open_source(path, task)


def _open_source(path: Path, task: str | None) -> Source:
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # ValueError, KeyError, and the errors of each configuration's own checks
        if read_json(path / "config.json").get("model_type") not in CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} does not know the model of {path}: {_first_line(error)}"
            ) from error
        raise CheckpointError(f"{path / 'config.json'} is not valid: {_last_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{path} holds quantized weights: export the model that they were made from")
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{path} is an encoder-decoder ({config.model_type}), which is not supported")
    names = config.architectures
    found = task_for(names[0] if names else None, task, where=str(path / "config.json"))
    return Source(path, config, found)


def traceable_experts(model: PreTrainedModel, source: Source) -> None:
    """Make a mixture of experts gather each token's experts, because torch.export cannot trace a loop over experts.

    Raises:
        UnsupportedModelError: the model's code has no experts_implementation; names the field of the configuration.
    """
    text = source.config.get_text_config()
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (getattr(text, name, None) or 0) <= 1:
            continue
        model.set_experts_implementation("batched_mm")
        if "batched_mm" not in model.get_experts_implementation().values():
            raise UnsupportedModelError(
                f"{source.path} is a mixture of experts ({name}={getattr(text, name)}) whose code the torch exporter "
                "cannot trace (no experts_implementation of transformers): try exporter='genai', or serve the merged "
                "checkpoint"
            )


def load_model(source: Source) -> PreTrainedModel:
    """Load the weights in float32, ready for inference.

    Raises:
        CheckpointError: the weights cannot be read, or lack a parameter that the task needs.
        UnsupportedModelError: the task does not exist for this model.
    """
    model, missing = load_weights(source, torch.float32)
    # feature-extraction does not export the pooling head, and encoders are often saved without one.
    missing = [key for key in missing if not (source.task.name == "feature-extraction" and "pooler" in key)]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise CheckpointError(f"{source.path} lacks weights that {source.task.name} needs: {shown}")
    if model.main_input_name != source.task.main_input:
        raise UnsupportedModelError(
            f"{source.architecture} reads {model.main_input_name}, "
            f"but {source.task.name} reads {source.task.main_input}"
        )
    return model.eval().requires_grad_(False)


def load_weights(source: Source, dtype: torch.dtype | Literal["auto"]) -> tuple[PreTrainedModel, list[str]]:
    """Load the model and name the parameters that its files lack, which are random.

    Args:
        source: the directory.
        dtype: of the weights; "auto" keeps that of the files.

    Raises:
        CheckpointError: the weights cannot be read.
        UnsupportedModelError: the task does not exist for this model.
    """
    auto_class = getattr(transformers, source.task.auto_class)
    try:
        model, info = auto_class.from_pretrained(
            source.path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except ValueError as error:
        raise UnsupportedModelError(
            f"a {source.config.model_type} model cannot do {source.task.name}: {_first_line(error)}"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the weights of {source.path}: {_first_line(error)}") from error
    return cast(PreTrainedModel, model), sorted(info["missing_keys"])


def load_tokenizer(directory: Path, *, pad_left: bool) -> Any:
    """The transformers tokenizer of a directory, ready to pad; None if there is none.

    Args:
        directory: a model directory or an exported one.
        pad_left: pad on the left, as a decoder needs it.
    """
    if not any(directory.glob("*token*.json")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer of {directory} cannot be read: {_first_line(error)}") from error
    tokenizer.padding_side = "left" if pad_left else "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _require_files(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"model directory {path} does not exist")
    if not read_json(path / "config.json"):
        raise CheckpointError(f"{path} has no config.json: expected a Hugging Face model directory")
    if not any((path / name).exists() for name in _WEIGHTS):
        raise CheckpointError(f"{path} has no safetensors weights: expected {' or '.join(_WEIGHTS)}")
    Checkpoint(path)  # reads every header as strictly as a merge does


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _last_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[-1].strip()
