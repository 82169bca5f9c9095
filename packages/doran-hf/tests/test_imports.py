"""The borders of this package, seen from a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, doran_hf
print(sorted({name.partition(".")[0] for name in sys.modules} & {"onnx", "vllm", "doran_export", "doran_serve"}))
"""


def test_neither_onnx_nor_vllm_is_imported() -> None:
    found = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
