"""The adapter directory: records of its three forms, their readers and writers."""

from typing import TYPE_CHECKING

from doran_core.adapter.read import read_adapter, read_folded
from doran_core.adapter.schema import (
    AnyAdapter,
    FoldedAdapter,
    FoldedModule,
    PeftAdapter,
    PeftModule,
    TrainableAdapter,
)
from doran_core.adapter.write import write_folded, write_peft_dora, write_trainable
from doran_core.support.lazy import renamed_names

__all__ = [
    "AnyAdapter",
    "FoldedAdapter",
    "FoldedModule",
    "PeftAdapter",
    "PeftModule",
    "TrainableAdapter",
    "read_adapter",
    "read_folded",
    "write_folded",
    "write_peft_dora",
    "write_trainable",
]

if not TYPE_CHECKING:
    __getattr__ = renamed_names(
        __name__,
        {
            "CompiledAdapter": "FoldedAdapter",
            "CompiledModule": "FoldedModule",
            "read_compiled": "read_folded",
            "write_compiled": "write_folded",
        },
    )
