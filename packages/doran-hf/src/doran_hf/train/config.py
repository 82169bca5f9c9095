"""The configuration of a training: the same fields in YAML, in Python and as flags.

Imports neither PEFT nor transformers before a configuration is made: `doran train --help` reads these fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from doran_core.errors import ConfigError, CorruptFileError
from doran_core.files.opening import named_errors, read_file
from doran_hf.options import AdapterOptions
from doran_hf.train.fields import check_fields, parse_yaml

if TYPE_CHECKING:
    from doran_hf.config import DoranConfig

__all__ = ["OWN_TRAINER_FIELDS", "SECTIONS", "DataConfig", "Task", "TrainConfig", "load_config", "section_record"]

Task = Literal["causal-lm", "sequence-classification", "image-classification"]
Format = Literal["auto", "json", "csv", "parquet", "text", "imagefolder", "hub"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of the examples, and the meaning of their columns.

    Attributes:
        train: a jsonl, json, csv, parquet or text file, a folder of images, or the name of a dataset.
        eval: likewise; None holds out ``eval_size`` examples of train.
        format: by default decided by the file's suffix; "hub" for the name of a dataset.
        subset: configuration of a dataset that has several.
        train_split: split of a dataset or of an image folder with splits.
        eval_split: likewise, used if ``eval`` is not None.
        eval_size: examples to hold out from train if there is no eval.
        max_train: use only the first N examples.
        max_eval: likewise.
        max_length: in tokens; longer examples are cut on the right.
        text: column, or template such as "{title}. {body}", of the text.
        text_pair: likewise, of a second text to classify with the first.
        messages: column of a chat: a list of {"role", "content"}.
        prompt: template of the prompt, with ``completion``.
        completion: template of the text to be learned after the prompt.
        chat: put prompt and completion into the tokenizer's chat template as user's and assistant's turns.
        system: a system message before prompt and completion.
        completion_only: take the loss on completions only (in chats: on the assistant's turns).
        append_eos: end each completion or text with the end-of-sequence token.
        choices: completions to choose from. Accuracy is the share of examples whose completion is the most probable.
        label: column of the class: a number or a name.
        label_names: names of the classes, for labels that are numbers.
        image: column of the image.
    """

    train: str = _option("", "file (jsonl, json, csv, parquet, txt), image folder, or name of a dataset")
    eval: str | None = _option(None, "likewise; null holds out eval_size examples of train")
    format: Format = field(
        default="auto", metadata={"help": "auto (by suffix), json, csv, parquet, text, imagefolder, hub"}
    )
    subset: str | None = _option(None, "configuration of a dataset that has several")
    train_split: str = _option("train", "split of a dataset or of an image folder with splits")
    eval_split: str = _option("test", "likewise, for eval")
    eval_size: int = _option(0, "examples of train to hold out if there is no eval")
    max_train: int | None = _option(None, "use only the first N examples")
    max_eval: int | None = _option(None, "likewise")
    max_length: int = _option(512, "tokens; longer examples are cut on the right")
    text: str | None = _option(None, 'column, or template such as "{title}. {body}"; default: text')
    text_pair: str | None = _option(None, "a second text to classify with the first")
    messages: str | None = _option(None, 'column of a chat, a list of {"role", "content"}; default: messages')
    prompt: str | None = _option(None, 'template, such as "Question: {question}\\nAnswer:"; default: {prompt}')
    completion: str | None = _option(None, 'template of what follows, such as " {answer}"; default: {completion}')
    chat: bool = _option(False, "put prompt and completion into the tokenizer's chat template")
    system: str | None = _option(None, "a system message before prompt and completion")
    completion_only: bool = _option(True, "loss on completions (in chats: the assistant's turns) only")
    append_eos: bool = _option(True, "end completions and texts with the end-of-sequence token")
    choices: list[str] | None = field(
        default=None, metadata={"help": "completions to choose from in evaluation, for an accuracy"}
    )
    label: str = _option("label", "column of the class, a number or a name")
    label_names: list[str] | None = field(
        default=None, metadata={"help": "names of the classes, for labels that are numbers"}
    )
    image: str = _option("image", "column of the image")

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train: expected a file, a folder or the name of a dataset, got nothing")
        for name in ("max_train", "max_eval", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}: expected a positive integer, got {value!r}")
        if self.eval_size < 0:
            raise ConfigError(f"data.eval_size: expected an integer not below 0, got {self.eval_size!r}")
        if (self.prompt is None) != (self.completion is None):
            raise ConfigError(f"data: prompt={self.prompt!r} and completion={self.completion!r}; give both or neither")
        if self.choices is not None and len(set(self.choices)) < 2:
            raise ConfigError(f"data.choices: expected at least two different completions, got {self.choices!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of one training.

    Attributes:
        base: directory or hub name of the base model.
        task: the kind of task, such as causal-lm.
        output: directory of the run: adapter, metrics, layer metrics, checkpoints.
        dtype: of the base model; the adapter is float32.
        seed: for initial values, order of the data and masks.
        evaluate_base: evaluate the untouched base model, too (causal-lm).
        keep_checkpoints: keep the Trainer's checkpoints when all is done.
        data: see :class:`DataConfig`.
        adapter: fields of :class:`doran_hf.DoranConfig`.
        trainer: fields of ``transformers.TrainingArguments``.

    Raises:
        ConfigError: naming field and value.
    """

    base: str = _option("", "directory or hub name of the base model")
    task: Task = field(
        default="causal-lm", metadata={"help": "causal-lm, sequence-classification or image-classification"}
    )
    output: str = _option("", "directory of the run: adapter, metrics, layer metrics, checkpoints")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the base model"}
    )
    seed: int = _option(0, "for initial values, order of the data and masks")
    evaluate_base: bool = _option(True, "evaluate the untouched base model, too (causal-lm)")
    keep_checkpoints: bool = _option(False, "keep the Trainer's checkpoints when all is done")
    data: DataConfig = field(metadata={"help": "the examples"})
    adapter: dict[str, Any] = field(default_factory=dict, metadata={"help": "options of DoranConfig"})
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"help": "transformers.TrainingArguments"})

    def __post_init__(self) -> None:
        for name in ("base", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected a name or directory, got nothing")
        unknown = sorted(set(self.trainer) & set(_REFUSED))
        if unknown:
            raise ConfigError(f"trainer.{unknown[0]}: set {_REFUSED[unknown[0]]} instead")
        if self.task != "causal-lm" and (self.data.choices or self.data.prompt or self.data.messages):
            raise ConfigError(f"data.choices, data.prompt and data.messages are for task causal-lm, got {self.task!r}")
        self.adapter_config()

    def adapter_config(self) -> DoranConfig:
        """The adapter's configuration.

        Raises:
            ConfigError: naming field and value.
        """
        from doran_hf.config import DoranConfig

        task_types = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
        values = {"task_type": task_types.get(self.task), **check_fields("adapter", self.adapter, DoranConfig)}
        return DoranConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the YAML file."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The configuration as YAML text."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


OWN_TRAINER_FIELDS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "warmup_steps": 0.05,
    "logging_steps": 10,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
}
"""Our defaults of TrainingArguments."""

_REFUSED = {
    "output_dir": "output",
    "seed": "seed",
    "data_seed": "seed",
    "resume_from_checkpoint": "nothing: a rerun resumes",
}

SECTIONS = ("data", "adapter", "trainer")
"""Sections of the configuration."""


def section_record(section: str) -> type[Any]:
    """The dataclass whose fields users set in a section."""
    if section == "trainer":
        from transformers import TrainingArguments

        arguments: type[Any] = TrainingArguments
        return arguments
    return {"data": DataConfig, "adapter": AdapterOptions}[section]


def load_config(file: str | Path | None, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read a configuration.

    Args:
        file: YAML file, or None for overrides alone.
        overrides: values that replace the file's, by field, or "section.field" in the sections.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has an unknown field or a wrong value.
    """
    values = {} if file is None else _read(Path(file))
    for name, value in (overrides or {}).items():
        section, dot, entry = name.partition(".")
        if not dot:
            values[name] = value
            continue
        inner = values.setdefault(section, {})
        values[section] = {**(inner if isinstance(inner, Mapping) else {}), entry: value}
    where = "configuration" if file is None else str(file)
    for section in SECTIONS:  # a section with only comments reads as null
        values[section] = {} if values.get(section) is None else values[section]
    values["data"] = DataConfig(**check_fields("data", values["data"], DataConfig))
    check_fields("trainer", values["trainer"], section_record("trainer"))
    return TrainConfig(**check_fields(where, values, TrainConfig))


CONFIG_LIMIT = 2**20
"""Largest size of a configuration file, in bytes."""


def _read(file: Path) -> dict[str, Any]:
    try:
        with named_errors(file, ConfigError):
            values = parse_yaml(read_file(file, CONFIG_LIMIT).decode("utf-8"), str(file))
    except CorruptFileError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a mapping of field to value, got {type(values).__name__}")
    return values
