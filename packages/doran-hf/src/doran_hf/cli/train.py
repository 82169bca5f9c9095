"""`doran train`: an adapter from a configuration file, flags, or both."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from doran_core.errors import ConfigError
from doran_hf.train.config import SECTIONS, TrainConfig, load_config
from doran_hf.train.fields import parse_yaml
from doran_hf.train.run import train
from doran_hf.train.template import commented_config, settable_fields

__all__ = ["register"]

_FLAG = "field:"
"""Begins the names under which argparse keeps the values of fields."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="train an adapter",
        description="Train a DoRAN adapter and write it with metrics, layer metrics and a model card. Run the same "
        "command again to go on with a run that was interrupted.",
        epilog="Any field of transformers.TrainingArguments is a flag as --trainer.NAME, e.g. "
        "--trainer.learning_rate 1e-3.",
    )
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
    for entry in dataclasses.fields(TrainConfig):
        if entry.name not in SECTIONS:
            _add_flag(group, entry.name, get_type_hints(TrainConfig)[entry.name], entry.metadata["help"])
    for section, record in SECTIONS.items():
        group, hints = parser.add_argument_group(section), get_type_hints(record)
        for entry in settable_fields(record):
            text = argparse.SUPPRESS if section == "trainer" else entry.metadata["help"].replace("%", "%%")
            _add_flag(group, f"{section}.{entry.name}", hints[entry.name], text)
    parser.set_defaults(func=_run)


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


def _run(arguments: argparse.Namespace) -> int:
    values = {
        name.removeprefix(_FLAG): _value(name.removeprefix(_FLAG), *given)
        for name, given in vars(arguments).items()
        if name.startswith(_FLAG)
    }
    if arguments.init is not None:
        return _init(Path(arguments.init), arguments.config, values)
    if arguments.config is None and not values:
        raise ConfigError("doran train: give a CONFIG.yaml (doran train --init writes one) or flags")
    train(load_config(arguments.config, values), overwrite=arguments.overwrite, dry_run=arguments.dry_run)
    return 0


def _init(file: Path, config: str | None, values: Mapping[str, Any]) -> int:
    if config is not None:
        raise ConfigError(f"--init writes a new configuration, but {config} was given, too: give one of them")
    if file.exists():
        raise ConfigError(f"--init: {file} exists; name another file")
    try:
        file.write_text(commented_config(values), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--init: cannot write {file}: {error.strerror}") from error
    print(f"wrote {file}; set base, output and data.train in it, then: doran train {file}")
    return 0


def _value(name: str, text: str, hint: Any) -> Any:
    """A flag's text as a value: as it stands where the field is a text, else read as in the file."""
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
