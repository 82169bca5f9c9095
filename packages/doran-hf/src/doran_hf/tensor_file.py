"""Refuses an adapter without safetensors before PEFT opens anything of it: PEFT would look for a pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from doran_core.adapter.read import require_adapter_files
from doran_core.adapter.schema import TENSOR_FILE
from doran_core.errors import MissingKeyError

__all__ = ["require_safetensors"]


def require_safetensors(name: str | os.PathLike[str], subfolder: str | None = None, **download: Any) -> Path:
    """The local directory of an adapter that has adapter_model.safetensors; from the hub, the file is downloaded.

    Args:
        name: a directory, or a repository of the hub.
        subfolder: within it.
        download: for ``hf_hub_download``.

    Raises:
        MissingKeyError: the file is missing. PEFT would load adapter_model.bin, a pickle, instead.
        CorruptFileError: a local file is a pipe, a device or a directory.
    """
    folder = Path(name, subfolder or "")
    if folder.is_dir():
        require_adapter_files(folder)
        return folder
    try:
        return Path(hf_hub_download(str(name), TENSOR_FILE, subfolder=subfolder, **download)).parent
    except EntryNotFoundError as error:
        raise MissingKeyError(
            f"{folder}: has no {TENSOR_FILE}; a pickle in its place is not opened: save the adapter as safetensors"
        ) from error
