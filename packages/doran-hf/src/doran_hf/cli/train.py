"""`doran train`: trains an adapter from a configuration file, flags, or both."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

from doran_core.cli.command import DoranCommand, Outcome
from doran_core.cli.options import FILE
from doran_core.cli.tables import Table
from doran_core.errors import ConfigError

__all__ = ["train"]


class _Field(click.Option):
    """The flag of one field of the configuration.

    Attributes:
        field: its name, "section.field" in the sections.
        hint: its type.
    """

    def __init__(self, field: str, hint: Any, text: str, *, hidden: bool = False) -> None:
        spellings = dict.fromkeys([f"--{field}", f"--{field.replace('_', '-')}"])
        # A yes-or-no flag may have no value.
        optional: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if bool in _alternatives(hint) else {}
        super().__init__([*spellings, field.replace(".", "__")], help=text, metavar="VALUE", hidden=hidden, **optional)
        self.field, self.hint = field, hint


class _Train(DoranCommand):
    """A command with a flag for each field. The trainer's fields take seconds to import, so they are read on demand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if any(argument.startswith("--trainer") for argument in args):
            self._add_trainer_flags()
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("--trainer"):
            self._add_trainer_flags()
        return super().shell_complete(ctx, incomplete)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not any(isinstance(parameter, _Field) and not parameter.hidden for parameter in self.params):
            self.params += _own_fields()
        return super().get_params(ctx)

    def _add_trainer_flags(self) -> None:
        if not any(isinstance(parameter, _Field) and parameter.hidden for parameter in self.params):
            self.params += _section_fields("trainer", hidden=True)


def _own_fields() -> Iterator[_Field]:
    from doran_hf.train.config import SECTIONS, TrainConfig

    hints = get_type_hints(TrainConfig)
    for entry in dataclasses.fields(TrainConfig):
        if entry.name not in SECTIONS:
            yield _Field(entry.name, hints[entry.name], entry.metadata["help"])
    for section in SECTIONS:
        if section != "trainer":
            yield from _section_fields(section)


def _section_fields(section: str, *, hidden: bool = False) -> Iterator[_Field]:
    from doran_hf.train.config import section_record
    from doran_hf.train.template import settable_fields

    hints = get_type_hints(section_record(section))
    for entry in settable_fields(section):
        text = "" if hidden else entry.metadata["help"]
        yield _Field(f"{section}.{entry.name}", hints[entry.name], text, hidden=hidden)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


@click.command(
    cls=_Train,
    group="train",
    short_help="train an adapter",
    epilog="Any field of transformers.TrainingArguments is a flag as --trainer.NAME, e.g. --trainer.max_steps 100.",
    examples=(
        "doran train --init                            # writes doran.yaml: fill it in",
        "doran train doran.yaml --dry-run",
        "doran train doran.yaml --adapter.rank 16 --trainer.learning_rate 5e-4",
        "doran train --base base --output run --data.train chats.jsonl --json > metrics.json",
    ),
)
@click.argument("config", required=False, metavar="[CONFIG.yaml]", type=FILE)
@click.option(
    "--init",
    is_flag=False,
    flag_value="doran.yaml",
    metavar="[FILE]",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a commented configuration with the values of the other flags, and stop (default: doran.yaml).",
)
@click.option("--dry-run", is_flag=True, help="Load everything, print the plan, train nothing.")
@click.option("--overwrite", is_flag=True, help="Remove an earlier run in the output directory.")
def train(config: str | None, init: Path | None, dry_run: bool, overwrite: bool, **given: str | None) -> Outcome:
    """Train a DoRAN adapter, and write it with metrics, layer metrics and a model card. Flags override the
    configuration file. To resume an interrupted run, run the same command again.
    """
    fields = (parameter for parameter in click.get_current_context().command.params if isinstance(parameter, _Field))
    texts = ((field, given[field.name or ""]) for field in fields)
    values = {field.field: _value(field.field, text, field.hint) for field, text in texts if text is not None}
    if init is not None:
        return _init(init, config, values)
    if config is None and not values:
        raise ConfigError("doran train: give a CONFIG.yaml (doran train --init writes one) or flags")
    from doran_hf.train.config import load_config
    from doran_hf.train.run import train as run_training

    loaded = load_config(config, values)
    metrics = run_training(loaded, overwrite=overwrite, dry_run=dry_run)
    return Outcome({"output": loaded.output, "dry_run": dry_run, **metrics}, _table(metrics))


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
        raise ConfigError(f"--init writes a new configuration, but {config} was given, too: give only one of them")
    if file.exists():
        raise ConfigError(f"--init: {file} exists; name another file")
    try:
        file.write_text(commented_config(values), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--init: cannot write {file}: {error.strerror}") from error
    text = f"wrote {file}; set base, output and data.train in it, then: doran train {file}"
    return Outcome({"written": str(file)}, [text])


def _value(name: str, text: str, hint: Any) -> Any:
    """Convert a flag's text to a value: unchanged for a text field, else parsed as in the file."""
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
