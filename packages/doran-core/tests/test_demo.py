"""examples/end_to_end.py says in one sentence what it lacks, before it does anything; `nox -s demo` runs it whole."""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import made
import pytest

DEMO = Path(__file__).parents[3] / "examples" / "end_to_end.py"


@pytest.fixture
def fails(tmp_path, monkeypatch):
    """Run the demo in a folder of its own; returns what it exits with: a string, printed with exit code 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(DEMO), *arguments])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(DEMO), run_name="__main__")
        message = exited.value.code
        assert message.startswith("end_to_end.py: error: ")
        assert "\n" not in message
        assert not (tmp_path / "report").exists()
        return message

    return run


def test_a_wrong_model_path(tmp_path, fails):
    assert "nowhere: no such checkpoint directory" in fails("--base", "nowhere")
    made.write_base(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert "base: no tokenizer.json there" in fails("--base", "base")
    (tmp_path / "base" / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in fails("--base", "base")


@pytest.mark.parametrize("missing", ["doran_hf", "onnxruntime"])
def test_a_missing_package(tmp_path, monkeypatch, fails, missing):
    if find_spec(missing) is not None:
        pytest.skip(f"{missing} is installed here")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("doran_hf", "doran_export"):
        if name != missing:
            (tmp_path / f"{name}.py").touch()
    assert f"the demo needs {missing}, which is not installed: pip install ./packages/doran-" in fails()
