"""Writes a folded adapter as a plain PEFT DoRA directory."""

from __future__ import annotations

from pathlib import Path

from doran_core.adapter import FoldedAdapter, read_folded, write_peft_dora
from doran_core.files import StrPath

__all__ = ["to_peft_dora"]


def to_peft_dora(adapter: FoldedAdapter | StrPath, out_dir: StrPath, *, overwrite: bool = False) -> Path:
    """Write a DoRA adapter that PEFT loads without doran and that computes the same function.

    DoRA's magnitude is ``m' = m n / (n + tau)``, so that PEFT's ``m' / n`` is DoRAN's c.

    Args:
        adapter: folded, or the directory of a folded adapter.
        out_dir: directory to write.
        overwrite: replace an adapter that `out_dir` already holds.

    Raises:
        AdapterFormatError: the directory does not hold a folded adapter.
        CheckpointError: `out_dir` cannot be written.
    """
    folded = adapter if isinstance(adapter, FoldedAdapter) else read_folded(adapter)
    return write_peft_dora(folded, out_dir, overwrite=overwrite)
