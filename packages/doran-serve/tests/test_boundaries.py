"""What importing this package loads, seen from a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
for name in ("vllm", "peft", "onnx", "onnxruntime", "transformers", "doran_hf", "doran_export"):
    sys.modules[name] = None  # importing it fails
import doran_serve, doran_serve.cli, doran_serve.compat, doran_serve.frontend, doran_serve.worker
print(doran_serve.register.__name__, doran_serve.AdapterStore.__name__)
"""


def test_importing_needs_no_vllm_and_no_neighbour() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["register", "AdapterStore"]
