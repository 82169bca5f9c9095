"""The adapter directory: records of what it can hold, and reading and writing them."""

from doran_core.adapter.read import read_adapter, read_compiled
from doran_core.adapter.schema import (
    AnyAdapter,
    CompiledAdapter,
    CompiledModule,
    PeftAdapter,
    PeftModule,
    TrainableAdapter,
)
from doran_core.adapter.write import write_compiled, write_peft_dora, write_trainable

__all__ = [
    "AnyAdapter",
    "CompiledAdapter",
    "CompiledModule",
    "PeftAdapter",
    "PeftModule",
    "TrainableAdapter",
    "read_adapter",
    "read_compiled",
    "write_compiled",
    "write_peft_dora",
    "write_trainable",
]
