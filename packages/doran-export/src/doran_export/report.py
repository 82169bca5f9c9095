"""export_report.json: the exported model, its exporter and versions, and every difference from PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from doran_export.files import REPORT_FILE
from doran_export.proof.proof import Proof

__all__ = ["ExportReport", "versions"]

_FORMAT_VERSION = 1
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda")
_PACKAGES = ("doran-export", "torch", "transformers", "onnx", "onnxscript", *_RUNTIMES)


@dataclass(frozen=True)
class ExportReport:
    """The report of an export. The file in the directory has the same fields except `directory`.

    Attributes:
        directory: the output directory.
        task: kind of model.
        architecture: name of the architecture.
        exporter: the exporter of the graph.
        precision: of the weights.
        target: the device of the graph, cpu or cuda.
        opset: ONNX operator set.
        files: size in bytes of each file of the model and of its adapters.
        adapters: for each adapter by name its number of modules, its ranks and the fingerprint of its base.
        proof: every check, with its differences.
        seconds: wall-clock time of each stage.
        versions: of the packages that took part.
    """

    directory: Path
    task: str
    architecture: str
    exporter: str
    precision: str
    target: str
    opset: int
    files: dict[str, int]
    adapters: dict[str, dict[str, Any]]
    proof: Proof
    seconds: dict[str, float]
    versions: dict[str, str]

    @property
    def road(self) -> str:
        """The old name of `exporter`."""
        return self.exporter

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data without the directory's path; the exporter also under its old name, "road"."""
        values = {name: value for name, value in asdict(self).items() if name != "directory"}
        return {"format_version": _FORMAT_VERSION, **values, "road": self.exporter, "proof": self.proof.to_dict()}

    def write(self, directory: Path) -> None:
        """Write export_report.json into a directory."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (directory / REPORT_FILE).write_text(text + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of the packages that affect the graph."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
