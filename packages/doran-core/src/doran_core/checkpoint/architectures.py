"""A table of transformers' architectures: the parameters that each ties, and those stored under other names.

A table, for adapters that record neither (PEFT's, and format version 1). ``tools/make_architectures.py`` makes it from
transformers, and doran-hf's tests compare it with the installed one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

__all__ = ["known_ties", "renamed_start", "stored_candidates", "template"]

_TABLE = "architectures.json"


@functools.cache
def _table() -> dict[str, Any]:
    """Two lists of maps; each architecture has an index into both, and the flag's default."""
    table: dict[str, Any] = json.loads(files(__package__).joinpath(_TABLE).read_text(encoding="utf-8"))
    return table


def known_ties(config: Mapping[str, Any]) -> dict[str, str] | None:
    """Each tied parameter and its source, by the model's names; None for an architecture that is not in the table.

    Args:
        config: a checkpoint's config.json.
    """
    entry = _entry(config)
    if entry is None:
        return None
    if not _flag(config, bool(entry["tied_by_default"])):
        return {}
    ties: dict[str, str] = _table()["ties"][entry["ties"]]
    return dict(ties)


def _flag(config: Mapping[str, Any], default: bool) -> bool:
    return bool(config.get("tie_word_embeddings", default))


def _entry(config: Mapping[str, Any]) -> dict[str, Any] | None:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found: dict[str, Any] | None = _table()["architectures"].get(name) if isinstance(name, str) else None
    return found


def stored_candidates(config: Mapping[str, Any], parameter: str) -> list[str]:
    """Names that a checkpoint may have for a parameter which transformers renames on loading; none for the others.

    The adapted model may be the checkpoint's architecture, a part of it, or a model around it. In the last two cases
    the names differ by a prefix.

    Args:
        config: the checkpoint's config.json.
        parameter: its name in the model.
    """
    entry = _entry(config)
    rules: dict[str, str] = {} if entry is None else _table()["names"][entry["names"]]
    if not rules:
        return []
    pattern, numbers = template(parameter)
    parts = pattern.split(".")
    inner = {rule.partition(".")[2]: stored for rule, stored in rules.items() if "." in rule}
    tries = [(rules, pattern), *((rules, ".".join(parts[cut:])) for cut in range(1, len(parts) - 1)), (inner, pattern)]
    for known, name in tries:
        stored = renamed_start(known, name)
        if stored != name:
            return [_filled(stored, numbers[len(numbers) - stored.split(".").count("{}") :])]
    return []


def renamed_start(rules: Mapping[str, str], pattern: str) -> str:
    """Apply the rule with the longest matching start to a name.

    Args:
        rules: starts of names and what stands for them, whole parts between dots.
        pattern: a name with ``{}`` for its numbers.
    """
    parts = pattern.split(".")
    for size in range(len(parts), 0, -1):
        start = ".".join(parts[:size])
        if start in rules:
            return ".".join([rules[start], *parts[size:]])
    return pattern


def template(name: str) -> tuple[str, list[str]]:
    """A name with ``{}`` in place of the parts that are numbers, and these."""
    parts = name.split(".")
    numbers = [part for part in parts if part.isdecimal()]
    return ".".join("{}" if part.isdecimal() else part for part in parts), numbers


def _filled(pattern: str, numbers: list[str]) -> str:
    remaining = iter(numbers)
    return ".".join(next(remaining, part) if part == "{}" else part for part in pattern.split("."))
