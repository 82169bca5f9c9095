"""The compiled form as a plain PEFT DoRA directory."""

from __future__ import annotations

from pathlib import Path

from doran_core.adapter import CompiledAdapter, read_compiled, write_peft_dora
from doran_core.files import StrPath

__all__ = ["to_peft_dora"]


def to_peft_dora(adapter: CompiledAdapter | StrPath, out_dir: StrPath, *, overwrite: bool = False) -> Path:
    """Write a DoRA adapter that PEFT loads without doran and that computes the same function.

    DoRA's magnitude is ``m' = m n / (n + tau)``, so that PEFT's ``m' / n`` is DoRAN's c.

    Args:
        adapter: compiled, or the directory of a compiled adapter.
        out_dir: directory to write.
        overwrite: replace an adapter that is there already.

    Raises:
        AdapterFormatError: the directory does not hold a compiled adapter.
        CheckpointError: `out_dir` cannot be written.
    """
    compiled = adapter if isinstance(adapter, CompiledAdapter) else read_compiled(adapter)
    return write_peft_dora(compiled, out_dir, overwrite=overwrite)
