"""The examples for operating a server: the systemd unit by systemd itself, and both by what they name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from doran_core.cli.group import parse

ROOT = Path(__file__).parents[3]
UNIT = ROOT / "examples" / "serving" / "doran-serve.service"
CONTAINER = ROOT / "examples" / "serving" / "Containerfile"


def parsed(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of ``doran serve``, and what it hands on to vLLM."""
    assert arguments[0] == "serve"
    context = parse(arguments)
    return context.params, context.args


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name  # systemd looks for the command; nothing else is changed
    unit.write_text(UNIT.read_text().replace("/opt/doran/bin/doran", shutil.which("true") or "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert done.returncode == 0, done.stderr
    assert not ours


def test_the_units_commands_are_those_of_doran_serve() -> None:
    lines = re.findall(r"^Exec\w+=(.*)$", UNIT.read_text(), flags=re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        program, *arguments = shlex.split(line)
        assert os.path.basename(program) == "doran"  # noqa: PTH119
        args, vllm_flags = parsed(arguments)
        assert args["base"] == "/srv/doran/base"
        assert args["adapters"] == Path("/srv/doran/adapters")
        assert vllm_flags == ([] if args["check"] else ["--host", "127.0.0.1", "--port", "8000"])


def test_the_container_copies_what_is_there() -> None:
    text = CONTAINER.read_text()
    sources = re.findall(r"^COPY (\S+) \S+$", text, flags=re.MULTILINE)
    assert [ROOT / source for source in sources] == [ROOT / "packages/doran-core", ROOT / "packages/doran-serve"]
    assert all((ROOT / source / "pyproject.toml").exists() for source in sources)
    entry, command = (re.search(rf"^{word} (\[.*\])$", text, flags=re.MULTILINE) for word in ("ENTRYPOINT", "CMD"))
    assert entry is not None
    assert command is not None
    program, *arguments = [*re.findall(r'"([^"]*)"', entry[1]), *re.findall(r'"([^"]*)"', command[1])]
    assert program == "doran"
    assert parsed(arguments)[1] == ["--host", "0.0.0.0", "--port", "8000"]
