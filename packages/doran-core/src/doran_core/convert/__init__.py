"""From one adapter form to another: trainable or PEFT to compiled, compiled to a PEFT DoRA directory."""

from doran_core.convert.compile import compile_adapter, from_peft
from doran_core.convert.peft import to_peft_dora

__all__ = ["compile_adapter", "from_peft", "to_peft_dora"]
