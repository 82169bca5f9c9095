"""The commented configuration that `doran train --init` writes, made from the fields themselves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from doran_hf.train.config import OWN_TRAINER_FIELDS, SECTIONS, TrainConfig, section_record

__all__ = ["commented_config", "settable_fields"]

_WIDTH = 40

_HEAD = """# A training. Run it with `doran train THIS_FILE`; to resume after an interruption, run that again.
# Every field is a flag, too: doran train THIS_FILE --adapter.rank 16 --trainer.learning_rate 5e-4
"""


def settable_fields(section: str) -> list[dataclasses.Field[Any]]:
    """The user-settable fields of a section."""
    return [entry for entry in dataclasses.fields(section_record(section)) if entry.init]


def commented_config(values: Mapping[str, Any]) -> str:
    """A configuration as commented YAML: all fields of base and data, the adapter's as comments, the usual trainer's.

    Args:
        values: fields to set, "section.field" in the sections.
    """
    lines = [_HEAD]
    for entry in dataclasses.fields(TrainConfig):
        if entry.name not in SECTIONS:
            lines.append(_line("", entry.name, values.get(entry.name, entry.default), entry.metadata["help"]))
    lines += ["", "data:", *_section("data", values)]
    lines += ["", "adapter:  # options of DoranConfig; those in comments have their defaults"]
    lines += _section("adapter", values, commented=True)
    lines += ["", "trainer:  # any field of transformers.TrainingArguments"]
    named = {name.removeprefix("trainer."): value for name, value in values.items() if name.startswith("trainer.")}
    lines += [f"  {name}: {json.dumps(value)}" for name, value in (OWN_TRAINER_FIELDS | named).items()]
    return "\n".join(lines) + "\n"


def _section(section: str, values: Mapping[str, Any], *, commented: bool = False) -> Iterator[str]:
    for entry in settable_fields(section):
        name = f"{section}.{entry.name}"
        mark = "  # " if commented and name not in values else "  "
        yield _line(mark, entry.name, values.get(name, _default(entry)), entry.metadata["help"])


def _line(indent: str, name: str, value: Any, comment: str) -> str:
    return f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}".ljust(_WIDTH) + f"  # {comment}"


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
