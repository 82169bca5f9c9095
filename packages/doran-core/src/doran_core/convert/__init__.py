"""Converts adapters: trainable or PEFT to folded, folded to a PEFT DoRA directory."""

from typing import TYPE_CHECKING

from doran_core.convert.fold import fold_adapter, from_peft
from doran_core.convert.peft import to_peft_dora
from doran_core.support.lazy import renamed_names

__all__ = ["fold_adapter", "from_peft", "to_peft_dora"]

if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, {"compile_adapter": "fold_adapter"})
