"""examples/end_to_end.py says in one sentence what it lacks, before it does anything; `nox -s demo` runs it whole."""

import os
import subprocess
import sys
from pathlib import Path

import made
import pytest

DEMO = Path(__file__).parents[3] / "examples" / "end_to_end.py"


def fails(folder, *arguments):
    done = subprocess.run(
        [sys.executable, DEMO, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "installed")},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line and "_conversion" not in line]
    assert done.returncode == 1
    assert len(lines) == 1
    assert lines[0].startswith("end_to_end.py: error: ")
    assert not (folder / "report").exists()
    return lines[0]


def test_a_wrong_model_path(tmp_path):
    assert "nowhere: no such checkpoint directory" in fails(tmp_path, "--base", "nowhere")
    made.write_base(tmp_path / "base")
    assert "base: no tokenizer_config.json there" in fails(tmp_path, "--base", "base")
    (tmp_path / "base" / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in fails(tmp_path, "--base", "base")


@pytest.mark.parametrize("present", [[], ["doran_hf", "doran_export"]])
def test_a_missing_package(tmp_path, present):
    for name in present:
        (tmp_path / "installed" / name).mkdir(parents=True)
        (tmp_path / "installed" / name / "__init__.py").touch()
    missing = ["doran_hf", "doran_export", "onnxruntime"][len(present)]
    if missing in ("doran_hf", "onnxruntime") and _is_installed(missing):
        pytest.skip(f"{missing} is installed here")
    assert f"the demo needs {missing}, which is not installed: pip install ./packages/doran-" in fails(tmp_path)


def _is_installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None
