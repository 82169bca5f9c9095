"""JSON objects in files: read with a named error, written so that equal contents give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doran_core.errors import CorruptFileError
from doran_core.files.opening import read_file

__all__ = ["JSON_LIMIT", "json_text", "parse_json", "parse_object", "read_json", "write_json"]

JSON_LIMIT = 64 * 2**20
"""Most bytes of a configuration or an index. The largest models have a few million."""

_DIGITS = 20
"""Most digits of an integer: 64 bits need no more."""


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptFileError: not JSON, JSON but not an object, or no regular file. A missing file raises OSError.
    """
    return parse_json(path, read_file(path, limit))


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """A JSON object from the bytes of a file. Raises as :func:`read_json`."""
    try:
        value = parse_object(data)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CorruptFileError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_object(data: bytes | str) -> Any:
    """JSON as other programs read it, too: each name once in an object, all text in Unicode, integers of 64 bits.

    Raises:
        ValueError, RecursionError: the text is not such JSON.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    value = json.loads(text, parse_int=_integer, object_pairs_hook=_distinct)
    if "\\ud" in text or "\\uD" in text:  # a lone surrogate fails when it is printed or written
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def json_text(value: Mapping[str, Any]) -> str:
    """A JSON object, indented, keys in the order given."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, as :func:`json_text` has it."""
    path.write_text(json_text(value), encoding="utf-8")
