"""The commented configuration that `doran train --init` writes, made from the fields themselves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from doran_hf.config import DoranConfig
from doran_hf.train.config import OWN_TRAINER_FIELDS, SECTIONS, DataConfig, TrainConfig

__all__ = ["commented_config", "settable_fields"]

_NOT_FOR_USERS = {"format_version", "created_by", "base_fingerprint", "module_kinds", "fan_in_fan_out"}
_WIDTH = 40

_HEAD = """# A training. Run it with `doran train THIS_FILE`; run that again to go on after an interruption.
# Every field is a flag, too: doran train THIS_FILE --adapter.rank 16 --trainer.learning_rate 5e-4
"""


def settable_fields(record: type[Any]) -> list[dataclasses.Field[Any]]:
    """The fields of a section that users set: all, but of the adapter those with a help text."""
    fields = [entry for entry in dataclasses.fields(record) if entry.init]
    if record is DoranConfig:
        return [
            e for e in fields if "help" in e.metadata and e.name not in _NOT_FOR_USERS and e.name in _ADAPTER_FIELDS
        ]
    return fields


_ADAPTER_FIELDS = set(DoranConfig.__annotations__)
"""DoranConfig's own fields; those that PEFT adds to every configuration are filled in elsewhere."""


def commented_config(values: Mapping[str, Any]) -> str:
    """A configuration as commented YAML: all fields of base and data, the adapter's as comments, the usual trainer's.

    Args:
        values: fields to set, "section.field" in the sections.
    """
    lines = [_HEAD]
    for entry in dataclasses.fields(TrainConfig):
        if entry.name not in SECTIONS:
            lines.append(_line("", entry.name, values.get(entry.name, entry.default), entry.metadata["help"]))
    lines += ["", "data:", *_section("data", DataConfig, values)]
    lines += ["", "adapter:  # options of DoranConfig; those in comments have their defaults"]
    lines += _section("adapter", DoranConfig, values, commented=True)
    lines += ["", "trainer:  # any field of transformers.TrainingArguments"]
    named = {name.removeprefix("trainer."): value for name, value in values.items() if name.startswith("trainer.")}
    lines += [f"  {name}: {json.dumps(value)}" for name, value in (OWN_TRAINER_FIELDS | named).items()]
    return "\n".join(lines) + "\n"


def _section(section: str, record: type[Any], values: Mapping[str, Any], *, commented: bool = False) -> Iterator[str]:
    for entry in settable_fields(record):
        name = f"{section}.{entry.name}"
        mark = "  # " if commented and name not in values else "  "
        yield _line(mark, entry.name, values.get(name, _default(entry)), entry.metadata["help"])


def _line(indent: str, name: str, value: Any, comment: str) -> str:
    return f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}".ljust(_WIDTH) + f"  # {comment}"


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
