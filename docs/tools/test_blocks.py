"""Every code block of docs/ and of the READMEs runs, or is checked and says why it does not run.

    pytest docs/tools                                            # all but what starts a vLLM engine
    pytest docs/tools/test_blocks.py -k engine_block --engine    # that, where vLLM is installed

The blocks of a page share one namespace and one folder, which setups.py fills.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from blocks import Block, blocks_of, evaluate
from places import REPOSITORY
from setups import prepare

ELSEWHERE = {
    "docs/migrating.md": "the Python of it: packages/doran-hf/tests/test_readme.py",
    "packages/doran-core/README.md": "the Python of it: packages/doran-core/tests/test_readme.py",
    "packages/doran-export/README.md": "the Python of it: packages/doran-export/tests/test_readme.py",
    "packages/doran-hf/README.md": "the Python of it: packages/doran-hf/tests/test_readme.py",
}
"""Pages whose Python is run by another test, in the environment of its package; their shell blocks are seen to here."""

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("README.md", "docs/**/*.md", "packages/*/README.md", "CONTRIBUTING.md")
    for path in REPOSITORY.glob(pattern)
)
MEASUREMENTS = "docs/results/"
"""Pages whose commands are measurements, which take minutes or hours of a machine at rest: all are only checked."""

MOST_UNRUN = 30
"""Blocks that are only checked. Raise it with a reason; lower it when one runs."""


def pages_with_engine_blocks() -> dict[str, list[str]]:
    """Source of each different block that imports vLLM, and the pages that have it."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for block in blocks_of(REPOSITORY / page):
            if imports_vllm(block) and block.reason is None:
                found.setdefault(block.source, []).append(page)
    return found


def imports_vllm(block: Block) -> bool:
    return block.language == "python" and re.search(r"^(from|import) vllm\b", block.source, re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"} | prepare(page, tmp_path)
    for block in blocks_of(REPOSITORY / page):
        if imports_vllm(block) or (block.language == "python" and page in ELSEWHERE):
            continue
        if page.startswith(MEASUREMENTS):
            block = replace(block, reason="a measurement")
        evaluate(block, namespace)


@pytest.mark.parametrize("source", pages_with_engine_blocks())
def test_engine_block(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """As a script of its own: vLLM starts processes that import it again."""
    if not request.config.getoption("--engine"):
        pytest.skip("starts a vLLM engine: the session `serve` runs it with --engine")
    prepare("docs/howto/vllm.md", tmp_path)
    script = tmp_path / "script.py"
    script.write_text(source, encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{pages_with_engine_blocks()[source]}: {done.stderr[-3000:]}"
    assert len(done.stdout.splitlines()) >= 3


def test_blocks_that_do_not_run_are_few() -> None:
    unrun = [block for page in PAGES for block in blocks_of(REPOSITORY / page) if block.reason is not None]
    listed = "\n".join(f"{block.page.relative_to(REPOSITORY)}:{block.line}: {block.reason}" for block in unrun)
    assert len(unrun) <= MOST_UNRUN, listed


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_fenced(page: str) -> None:
    """An indented block would escape the tests above."""
    if page.startswith(MEASUREMENTS):
        pytest.skip("commands of measurements may stand indented")
    text = re.sub(r"^( *)(```+).*?^\1\2 *$", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    indented = [
        line for line in re.findall(r"\n\n((?: {4}|\t)\S.*)", text) if not line.lstrip().startswith(("-", "1."))
    ]
    assert not indented
