"""Puts an adapter into a serving directory in one step: a running server never sees half of one. No vLLM here."""

from __future__ import annotations

import shutil
from pathlib import Path

from doran_core.adapter import read_adapter
from doran_core.adapter.schema import ADAPTER_FILES, CONFIG_FILE, SCALE_FILE, TENSOR_FILE
from doran_core.errors import AdapterFormatError, DoranError
from doran_core.files.atomic import new_directory
from doran_core.files.opening import is_plain_name
from doran_serve.admission import content_digest
from doran_serve.base import local_directory
from doran_serve.store import AdapterStore

__all__ = ["publish_adapter"]


def publish_adapter(adapter: Path, target: Path, base: str | None = None) -> Path:
    """Copy an adapter to `target` in one step; replaces an existing adapter.

    Args:
        adapter: the adapter's directory.
        target: a subdirectory of the served directory; clients request the adapter by its name.
        base: the served base model, against which to check the adapter.

    Returns:
        `target`, resolved.

    Raises:
        DoranError: the adapter cannot be read or does not fit the base, or `target` cannot be an adapter's directory.
    """
    target = target.resolve()
    if not is_plain_name(target.name):
        raise DoranError(f"{target}: no name for an adapter; it may not start with a dot")
    if target == adapter.resolve():
        raise DoranError(f"{target}: is the adapter itself; expected another directory to publish it to")
    if target.is_dir() and not (target / CONFIG_FILE).exists() and any(target.iterdir()):
        raise DoranError(
            f"{target}: holds other things than an adapter; name the adapter's own directory, such as "
            f"{target / adapter.resolve().name}"
        )
    before = content_digest(adapter)
    if base is None:
        read_adapter(adapter)
    else:
        AdapterStore(local_directory(base), stacks=True).check(adapter)  # an engine in mixed mode refuses stacks itself
    with new_directory(target, overwrite=True, owned=ADAPTER_FILES) as staging:
        for name in (CONFIG_FILE, TENSOR_FILE, SCALE_FILE):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, staging / name)
        if content_digest(staging) != before:
            raise AdapterFormatError(f"{adapter}: its files changed while they were published; {target} is as before")
    return target
