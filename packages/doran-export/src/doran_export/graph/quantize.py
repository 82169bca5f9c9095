"""Dynamic int8 for the CPU: weights in 8 bits, activations quantized at run time."""

from __future__ import annotations

import logging
from pathlib import Path

from doran_core.errors import require
from doran_export.errors import ExportError
from doran_export.files import MODEL_FILE

__all__ = ["quantize_weights"]


def quantize_weights(directory: Path, *, external_data: bool) -> None:
    """Replace ``model.onnx`` by its int8 form: one scale per column of each MatMul's and Gemm's weight.

    Args:
        directory: holds the float32 graph.
        external_data: whether the weights stay in a file beside the graph.

    Raises:
        ExportError: onnxruntime's quantizer failed.
        MissingDependencyError: onnxruntime is not installed.
    """
    tools = require(
        "onnxruntime.quantization", package="doran-export", extra="cpu", purpose="quantizing a graph to int8"
    )
    source, result = directory / MODEL_FILE, directory / "quantized" / MODEL_FILE
    result.parent.mkdir()
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it recommends a needless preprocessing
    try:
        tools.quantize_dynamic(
            source,
            result,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=tools.QuantType.QInt8,
            use_external_data_format=external_data,
            extra_options={"MatMulConstBOnly": True},
        )
    except OSError:
        raise
    except Exception as error:
        raise ExportError(f"onnxruntime's quantizer failed: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.getLogger().setLevel(level)
    for old in directory.glob(f"{MODEL_FILE}*"):
        old.unlink()
    for new in result.parent.iterdir():
        new.replace(directory / new.name)
    result.parent.rmdir()
