"""The README's Python examples, run as written; the client's is run in test_http_merged, where a server is up."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_specs import make_adapter
from readme import python_block

from doran_serve.merged.mode import merged_options


def test_from_python(checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    weights = reference("smollm2").weights
    for seed, name in enumerate(("sentiment", "critic")):
        spec = make_adapter("compiled", weights, ("q_proj", "v_proj"), rank=8, seed=seed, size=0.3, skip=r"\.[12]\d\.")
        spec.write(tmp_path / "path" / "to" / name)
    (tmp_path / "path" / "to" / "base").symlink_to(checkpoint("smollm2"))
    (tmp_path / "example.py").write_text(python_block("LoRARequest("))
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    printed = next(line for line in done.stdout.splitlines() if line.startswith("["))
    base, sentiment, critic = ast.literal_eval(printed)
    assert all(isinstance(text, str) and text for text in (base, sentiment, critic))
    assert len({base, sentiment, critic}) == 3


def test_merged_mode_is_asked_for_as_written() -> None:
    """Engines of merged mode are tested in test_merged, with these very options."""
    call = ast.parse(python_block("doran_mode")).body[0].value  # type: ignore[attr-defined]
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert options == {"additional_config": merged_options()}
