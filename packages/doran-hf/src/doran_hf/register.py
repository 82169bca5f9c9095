"""Makes PEFT know DORAN. PEFT's own ``register_peft_method`` refuses names outside its enum, hence this file.

To be removed when PEFT accepts methods from other packages: then one call of its function does all of this.
"""

from __future__ import annotations

import enum
from typing import Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from doran_core.errors import DoranError

__all__ = ["PREFIX", "DoranPeftType", "register"]

PREFIX = "doran_"
"""What the names of DORAN's submodules begin with in an adapted layer."""


class DoranPeftType(str, enum.Enum):  # noqa: UP042 - PEFT takes a member's name from the text "Class.NAME"
    """The value of ``peft_type``: equal to, and hashed as, the string "DORAN", as PEFT's own members are."""

    DORAN = "DORAN"


def register(config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Enter DORAN into PEFT's mappings. Calling it again changes nothing.

    Raises:
        DoranError: if another package has taken the name or the prefix.
    """
    entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_class),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner_class),
        (PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    ]
    key = DoranPeftType.DORAN
    for mapping, value in entries:
        if key in mapping and not _same(mapping[key], value):
            raise DoranError(f"PEFT already knows a method {key.value!r}: {mapping[key]!r}; cannot register {value!r}")
    owner = next((name for name, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == PREFIX), key)
    if owner != key:
        raise DoranError(f"PEFT already uses the prefix {PREFIX!r}, for the method {owner!r}")
    for mapping, value in entries:
        mapping[key] = value


def _same(old: Any, new: Any) -> bool:
    """Equal, or the same class from before a reload of the module."""
    if isinstance(old, type) and isinstance(new, type):
        return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)
    return bool(old == new)
