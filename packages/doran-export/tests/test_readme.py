"""The first example of the README runs as written; the fragments after it have their like in docs/howto."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_example(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    example, *_ = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    report = names["report"]
    assert report.proof.max_difference < 1e-3  # type: ignore[attr-defined]
    assert names["one"] @ names["two"] > names["one"] @ names["three"] + 0.3  # type: ignore[operator]
