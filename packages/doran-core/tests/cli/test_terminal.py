"""Terminals and streams of every kind, and the exit code of what the machine refuses, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import made
import pytest
from damage import edit_config, unseal

from doran_core.cli import exit_codes
from doran_core.cli.main import main

ODD = "ä \x1b[31mred\x1b[0m \x9b2J \u202egnp.exe"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    weights = made.base_weights()
    made.write_base(folder / "base", weights)
    made.write_adapter(folder / "adapter", weights)
    made.write_adapter(folder / "odd", weights)
    unseal(folder / "odd")
    edit_config(folder / "odd", base_model_name_or_path=ODD)
    return folder


def doran(*arguments, encoding="utf-8", shell_redirection="", **options):
    line = f'exec "$0" -m doran_core.cli "$@" {shell_redirection}'
    environment = os.environ | {"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if encoding == "utf-8":
        environment |= {"PYTHONUTF8": "1"}
    command = ["sh", "-c", line, sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False, **options)


def test_metadata_does_not_steer_the_terminal(folder):
    done = doran("inspect", folder / "odd")
    assert done.returncode == exit_codes.OK
    shown = done.stdout.decode()
    assert "ä \\x1b[31mred\\x1b[0m \\x9b2J \\u202egnp.exe" in shown
    assert not set("\x1b\x9b\u202e") & set(shown)
    as_json = doran("inspect", folder / "odd", "--json").stdout.decode()
    assert json.loads(as_json)["base_model"] == ODD
    assert not set("\x1b\x9b\u202e") & set(as_json)


def test_errors_do_not_steer_the_terminal_either(folder, tmp_path):
    done = doran("inspect", tmp_path / "a\x1b[2Jb", "--debug")
    assert done.returncode == exit_codes.USAGE
    assert b"\x1b" not in done.stderr
    assert b"a\\x1b[2Jb: no such adapter directory" in done.stderr


def test_an_ascii_terminal(folder):
    done = doran("inspect", folder / "odd", encoding="ascii")
    assert (done.returncode, b"\\xe4 \\x1b[31m" in done.stdout) == (exit_codes.OK, True)
    done = doran("inspect", folder / "odd", "--json", encoding="ascii")
    assert json.loads(done.stdout.decode("ascii"))["base_model"] == ODD


@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-"])
def test_closed_streams(folder, tmp_path, redirection):
    done = doran(
        *("merge", "--base", folder / "base", "--adapter", folder / "adapter", "--out", tmp_path / "out"),
        shell_redirection=redirection,
    )
    assert done.returncode == exit_codes.OK
    assert sorted(made.folder_bytes(tmp_path / "out")) == sorted(made.folder_bytes(folder / "base"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written(folder):
    done = doran("inspect", folder / "adapter", shell_redirection=">/dev/full")
    assert done.returncode == exit_codes.SYSTEM
    assert done.stderr.decode().count("\n") == 1
    assert b"No space left on device" in done.stderr


MERGE = ("merge", "--base", "base", "--adapter", "adapter", "--out")
CONVERT = ("convert", "adapter", "--to", "peft-dora", "--base", "base", "--overwrite", "--out")


@pytest.mark.parametrize("out", ["/", ".", ""])
@pytest.mark.parametrize("command", [MERGE, CONVERT])
@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_places_that_cannot_be_replaced(folder, monkeypatch, capsys, command, out, debug):
    monkeypatch.chdir(folder)
    inode = folder.stat().st_ino
    assert main([*command, out, *debug]) == exit_codes.USAGE
    printed = capsys.readouterr().err
    assert "doran: error: cannot write" in printed
    assert "current directory" in printed
    assert ("Traceback" in printed) == bool(debug)
    assert folder.stat().st_ino == inode


@pytest.mark.parametrize("small_disk", [4], indirect=True)
@pytest.mark.parametrize("command", [MERGE, CONVERT])
def test_one_exit_code_for_a_full_disk(folder, small_disk, monkeypatch, capsys, command):
    (small_disk / "full").write_bytes(b"x" * 4096)
    monkeypatch.chdir(folder)
    assert main([*command, str(small_disk / "out")]) == exit_codes.SYSTEM
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].endswith("the disk is full")
    assert "Traceback" not in printed
    assert [path.name for path in small_disk.iterdir()] == ["full"]
    assert main([*command, str(small_disk / "out"), "--debug"]) == exit_codes.SYSTEM
