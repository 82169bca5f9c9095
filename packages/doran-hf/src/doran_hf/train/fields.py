"""Values of configuration fields: read from YAML, checked against a dataclass's types, unknown names explained."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from doran_core.errors import ConfigError

__all__ = ["check_fields", "parse_yaml"]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string, but a learning rate means a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*)?(\.\d*)?(?:(?<=\d)|(?<=\.))([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$|^[-+]?\.(inf|nan)$"
    ),
    list("-+0123456789."),
)


_MOST_BRACKETS = 2000
"""Most brackets of a configuration: YAML's time grows with the square of the nesting."""


def parse_yaml(text: str, where: str) -> Any:
    """YAML text as plain data.

    Args:
        text: of a file or of one flag.
        where: file or flag, for the message.

    Raises:
        ConfigError: the text is not YAML.
    """
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise ConfigError(f"{where}: more than {_MOST_BRACKETS} brackets")
    try:
        # A few lines of nested aliases would expand to gigabytes.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_Loader)):
            raise ConfigError(f"{where}: YAML with aliases (*name): write the values out")
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # a date such as 2001-99-99
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def check_fields(where: str, values: object, record: type[Any]) -> dict[str, Any]:
    """Check names and types of values for a dataclass.

    Args:
        where: section of the configuration, for the message.
        values: a mapping of field name to value.
        record: the dataclass.

    Returns:
        The values as a dict; whole numbers given for a float are floats.

    Raises:
        ConfigError: not a mapping, an unknown field (with the nearest names), or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of field to value, got {values!r}")
    hints = get_type_hints(record)
    known = {entry.name for entry in dataclasses.fields(record) if entry.init}
    checked = {}
    for name, value in values.items():
        if name not in known:
            near = get_close_matches(str(name), sorted(known), 3)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; known are {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown field {name!r}{hint}")
        if not _fits(value, hints[name]):
            raise ConfigError(f"{where}.{name}: expected {_describe(hints[name])}, got {value!r}")
        checked[str(name)] = float(value) if hints[name] is float else value
    return checked


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, get_args(hint)[0]) for entry in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    return True  # another type, such as an enum, which its owner checks


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {list(get_args(hint))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if hint is type(None):
        return "null"
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
