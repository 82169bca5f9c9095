"""File names of an exported directory, and the small files that are copied from the model directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from doran_core.errors import CheckpointError, CorruptFileError
from doran_core.files.jsonfile import read_json as read_json_object
from doran_core.files.opening import named_errors
from doran_export.errors import ExportError

__all__ = [
    "ADAPTERS",
    "ADAPTER_SUFFIX",
    "GENAI_CONFIG",
    "MODEL_FILE",
    "REPORT_FILE",
    "adapter_files",
    "copy_side_files",
    "read_json",
    "require_free_place",
]

MODEL_FILE = "model.onnx"
REPORT_FILE = "export_report.json"
GENAI_CONFIG = "genai_config.json"
ADAPTERS = "adapters"
ADAPTER_SUFFIX = ".onnx_adapter"

# Files that a tokenizer, an image processor or a sentence-transformers pipeline reads; none holds weights.
_SIDE_FILES = (
    "generation_config.json",
    "*token*.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
    "*.model",
    "*processor_config.json",
    "modules.json",
    "*sentence*.json",
    "1_Pooling/config.json",
    "LICENSE*",
)


def copy_side_files(source: Path, out: Path) -> None:
    """Copy tokenizer, processor and license files from a model directory."""
    for pattern in _SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                target = out / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def adapter_files(directory: Path) -> dict[str, Path]:
    """The adapters of an exported directory, by name."""
    return {
        path.name.removesuffix(ADAPTER_SUFFIX): path for path in sorted(directory.glob(f"{ADAPTERS}/*{ADAPTER_SUFFIX}"))
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one when there is no such file.

    Raises:
        CheckpointError: the file is not JSON, or holds no object.
    """
    try:
        with named_errors(path, CheckpointError):
            try:
                return read_json_object(path)
            except FileNotFoundError:
                return {}
    except CorruptFileError as error:
        raise CheckpointError(str(error)) from error


def require_free_place(out: Path) -> None:
    """Check that `out` may be created: it is absent or an empty directory.

    Raises:
        ExportError: `out` is a file, or a directory that is not empty.
    """
    if out.is_dir():
        inside = next(out.iterdir(), None)
        if inside is not None:
            raise ExportError(f"output directory {out} is not empty (it holds {inside.name}): name a new one")
    elif out.exists():
        raise ExportError(f"output {out} exists and is not a directory: name a new directory")
