"""`doran train`: an adapter from a configuration file, flags, or both."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from doran_core.cli.command import Command, Outcome
from doran_core.cli.tables import Table
from doran_core.errors import ConfigError

__all__ = ["COMMAND"]

_FLAG = "field:"
"""Begins the names under which argparse keeps the values of fields."""


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    from doran_hf.train.config import SECTIONS, TrainConfig

    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="configuration; flags go before its values")
    parser.add_argument(
        "--init",
        nargs="?",
        const="doran.yaml",
        metavar="FILE",
        help="write a commented configuration with the values of the other flags, and stop (default: doran.yaml)",
    )
    parser.add_argument("--dry-run", action="store_true", help="load everything, print the plan, train nothing")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run in the output directory")
    group = parser.add_argument_group("what to train")
    hints = get_type_hints(TrainConfig)
    for entry in dataclasses.fields(TrainConfig):
        if entry.name not in SECTIONS:
            _add_flag(group, entry.name, hints[entry.name], entry.metadata["help"])
    for section in SECTIONS:
        # Only transformers knows the trainer's fields, and takes seconds to import.
        if section != "trainer" or argv is None or any(argument.startswith("--trainer") for argument in argv):
            _add_section(parser.add_argument_group(section), section)


def _add_section(group: argparse._ArgumentGroup, section: str) -> None:
    from doran_hf.train.config import section_record
    from doran_hf.train.template import settable_fields

    hints = get_type_hints(section_record(section))
    for entry in settable_fields(section):
        text = argparse.SUPPRESS if section == "trainer" else entry.metadata["help"].replace("%", "%%")
        _add_flag(group, f"{section}.{entry.name}", hints[entry.name], text)


def _add_flag(group: argparse._ArgumentGroup, name: str, hint: Any, text: str) -> None:
    spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
    options: dict[str, Any] = {"nargs": "?", "const": "true"} if bool in _alternatives(hint) else {}
    group.add_argument(
        *spellings,
        dest=_FLAG + name,
        default=argparse.SUPPRESS,
        metavar="VALUE",
        help=text,
        type=lambda given: (given, hint),
        **options,
    )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _run(arguments: argparse.Namespace) -> Outcome:
    values = {
        name.removeprefix(_FLAG): _value(name.removeprefix(_FLAG), *given)
        for name, given in vars(arguments).items()
        if name.startswith(_FLAG)
    }
    if arguments.init is not None:
        return _init(Path(arguments.init), arguments.config, values)
    if arguments.config is None and not values:
        raise ConfigError("doran train: give a CONFIG.yaml (doran train --init writes one) or flags")
    from doran_hf.train.config import load_config
    from doran_hf.train.run import train

    config = load_config(arguments.config, values)
    metrics = train(config, overwrite=arguments.overwrite, dry_run=arguments.dry_run)
    return Outcome({"output": config.output, "dry_run": arguments.dry_run, **metrics}, _table(metrics))


def _table(metrics: Mapping[str, Any]) -> list[Table]:
    """The metrics of base and adapter side by side."""
    base, adapter = metrics.get("base") or {}, metrics.get("adapter") or {}
    if not adapter:
        return []
    columns = [column for column in (base, adapter) if column]
    header = ["metric", *(["base"] if base else []), "adapter"]
    names = dict.fromkeys([*base, *adapter])
    rows = [[name, *(f"{column[name]:.4g}" if name in column else "" for column in columns)] for name in names]
    return [Table(header, rows)]


def _init(file: Path, config: str | None, values: Mapping[str, Any]) -> Outcome:
    from doran_hf.train.template import commented_config

    if config is not None:
        raise ConfigError(f"--init writes a new configuration, but {config} was given, too: give one of them")
    if file.exists():
        raise ConfigError(f"--init: {file} exists; name another file")
    try:
        file.write_text(commented_config(values), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--init: cannot write {file}: {error.strerror}") from error
    text = f"wrote {file}; set base, output and data.train in it, then: doran train {file}"
    return Outcome({"written": str(file)}, [text])


def _value(name: str, text: str, hint: Any) -> Any:
    """A flag's text as a value: as it stands where the field is a text, else read as in the file."""
    from doran_hf.train.fields import parse_yaml

    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    if text == "null" and len(kinds) < len(_alternatives(hint)):
        return None
    if kinds == [str]:
        return text
    if str not in kinds:
        return parse_yaml(text, f"--{name}")
    try:
        value = parse_yaml(text, f"--{name}")
    except ConfigError:
        return text
    return value if isinstance(value, list | dict) else text


COMMAND = Command(
    summary="train an adapter",
    description="Train a DoRAN adapter and write it with metrics, layer metrics and a model card. Run the same "
    "command again to go on with a run that was interrupted.",
    group="train",
    add_arguments=_add_arguments,
    run=_run,
    examples=(
        "doran train --init                            # writes doran.yaml: fill it in",
        "doran train doran.yaml --dry-run",
        "doran train doran.yaml --adapter.rank 16 --trainer.learning_rate 5e-4",
        "doran train --base base --output run --data.train chats.jsonl --json > metrics.json",
    ),
    notes="Any field of transformers.TrainingArguments is a flag as --trainer.NAME, e.g. --trainer.max_steps 100.",
)
