"""Names and small files of an exported directory, and what comes along from the model directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from doran_core.errors import CheckpointError

__all__ = [
    "ADAPTERS",
    "ADAPTER_SUFFIX",
    "GENAI_CONFIG",
    "MODEL_FILE",
    "REPORT_FILE",
    "adapter_files",
    "copy_companions",
    "read_json",
]

MODEL_FILE = "model.onnx"
REPORT_FILE = "export_report.json"
GENAI_CONFIG = "genai_config.json"
ADAPTERS = "adapters"
ADAPTER_SUFFIX = ".onnx_adapter"

# What a tokenizer, an image processor or a sentence-transformers pipeline reads, and nothing that holds weights.
_COMPANIONS = (
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


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer, processor and license files from a model directory."""
    for pattern in _COMPANIONS:
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
        CheckpointError: it is not JSON or not an object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value
