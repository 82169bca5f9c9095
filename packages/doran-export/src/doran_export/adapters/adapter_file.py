"""onnxruntime's adapter file: the graph inputs that one adapter gives, in a file that is mapped, not parsed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from doran_export.errors import ExportError
from doran_export.runtime.providers import onnxruntime

__all__ = ["read_adapter", "write_adapter"]

_VERSION = 1
_BFLOAT16 = 16  # ONNX's number


def write_adapter(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write an ``.onnx_adapter`` file.

    Args:
        tensors: by the names of the graph's inputs.
        path: the new file.

    Raises:
        ExportError: onnxruntime cannot write it.
        OSError: the disk is full.
    """
    runtime = onnxruntime()
    make, make_typed = runtime.OrtValue.ortvalue_from_numpy, runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
    values = {
        name: make_typed(tensor.view(torch.int16).numpy(), _BFLOAT16)
        if tensor.dtype == torch.bfloat16
        else make(tensor.numpy())
        for name, tensor in tensors.items()
    }
    file = runtime.AdapterFormat()
    file.set_adapter_version(_VERSION)
    file.set_model_version(_VERSION)
    file.set_parameters(values)
    try:
        file.export_adapter(str(path))
    except Exception as error:  # onnxruntime does not distinguish a full disk from other failures
        if shutil.disk_usage(path.parent).free < sum(tensor.nbytes for tensor in tensors.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise ExportError(f"onnxruntime cannot write {path.name}: {str(error).strip()}") from error


def read_adapter(path: Path) -> dict[str, Tensor]:
    """The tensors of an ``.onnx_adapter`` file by the names of the graph's inputs.

    Raises:
        ExportError: onnxruntime cannot read it.
    """
    try:
        file = onnxruntime().AdapterFormat.read_adapter(str(path))
    except Exception as error:
        raise ExportError(f"onnxruntime cannot read the adapter {path}: {str(error).strip()}") from error
    return {name: _copy(value) for name, value in file.get_parameters().items()}


def _copy(value: Any) -> Tensor:
    """A copy of an OrtValue, whose memory is freed with the file. Uses numpy if it has the dtype."""
    if value.data_type() == "tensor(bfloat16)":
        return from_dlpack(value).clone()
    return torch.from_numpy(value.numpy().copy())
