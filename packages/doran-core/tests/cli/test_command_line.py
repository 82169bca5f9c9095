"""The frame of the `doran` command: what it imports, help, exit codes, near names, JSON, tables, completion."""

import io
import json
import os
import shutil
import subprocess
import sys

import click
import pytest

import doran_core
from doran_core.cli import exit_codes, group, tables
from doran_core.cli.command import DoranCommand, Outcome, reading_flags
from doran_core.cli.main import main
from doran_core.cli.tables import Table
from doran_core.errors import CheckFailedError, ConfigError

OWN = ("completion", "convert", "inspect", "merge")


class Entry:
    """An entry point of a package that is installed."""

    def __init__(self, name, run=None, error=None, **more):
        self.name, self.error, self.loaded = name, error, False
        run = run or (lambda: Outcome({}))
        self.command = DoranCommand(name, group="shell", callback=run, help="A description.", **more)

    def load(self):
        self.loaded = True
        if self.error:
            raise self.error
        return self.command


@pytest.fixture
def install(monkeypatch):
    """Make these the installed commands."""

    def install(*entries):
        monkeypatch.setattr(group, "entry_points", lambda group: list(entries))
        monkeypatch.setattr(group.doran, "commands", type(group.doran.commands)())

    return install


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in OWN)])
def test_what_only_prints_imports_no_torch(arguments):
    code = f"""
import sys
from doran_core.cli.main import main
print(main({arguments}), "torch" in sys.modules, "rich" in sys.modules)
"""
    assert python(code).splitlines()[-1] == "0 False False"


def test_importing_the_package_imports_no_torch_and_each_name_has_a_home():
    assert python("import sys, doran_core; print('torch' in sys.modules)") == "False\n"
    assert all(hasattr(doran_core, name) for name in (*doran_core.__all__, "__version__"))
    assert callable(doran_core.adapt)
    with pytest.raises(AttributeError, match="module 'doran_core' has no attribute 'nonsense'"):
        doran_core.nonsense  # noqa: B018


def test_help_has_groups_examples_and_exit_codes(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "\nAdapters:\n  convert " in printed
    assert printed.index("\nOptions:") < printed.index("\nAdapters:") < printed.index("\nShell:")
    assert all(f"\n  {code:<5}" in printed for code in exit_codes.MEANINGS)


def test_every_command_has_examples_that_parse():
    for name in OWN:
        examples = group.doran.commands[name].examples
        assert examples, name
        for example in examples:
            words = example.split("#")[0].split("|")[0].split(">")[0].split()
            assert words[:2] == ["doran", name]
            assert group.parse(words[1:]).params


def test_installed_command():
    done = subprocess.run([sys.executable, "-m", "doran_core.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"doran-core {doran_core.__version__}\n" in done.stdout
    assert "\ntorch " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mrege"], "No such command 'mrege'. Did you mean 'merge'? See: doran --help"),
        (["zzz"], "No such command 'zzz'. See: doran --help"),
        (["inspect", "adapter", "--jsn"], "No such option '--jsn'. Did you mean '--json'? See: doran inspect --help"),
        (["merge", "--bse=x", "--out", "y"], "No such option '--bse'. Did you mean '--base'?"),
        (["merge", "--out", "y"], "Missing option '--base'."),
        (["merge", "--allow-base"], "No such option '--allow-base'"),
        (["convert", "adapter", "--to", "foldd", "--base", "b", "--out", "o"], "'foldd' is not one of 'folded'"),
        ([], "Missing command. See: doran --help"),
    ],
)
def test_misspelt(arguments, words, capsys):
    code = main(arguments)
    printed = capsys.readouterr()
    assert (code, printed.out) == (exit_codes.USAGE, "")
    assert words in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("a: wrong"), exit_codes.USAGE, "doran: error: a: wrong\n"),
        (CheckFailedError("they differ"), exit_codes.CHECK_FAILED, "doran: error: they differ\n"),
        (OSError(28, "No space left on device", "out/x"), exit_codes.SYSTEM, "No space left on device: 'out/x'\n"),
        (MemoryError("8 GiB"), exit_codes.SYSTEM, "doran: error: out of memory: 8 GiB\n"),
        (KeyboardInterrupt(), exit_codes.INTERRUPTED, "doran: interrupted\n"),
        (KeyError("x"), exit_codes.BUG, "doran: bug: KeyError: 'x' ("),
    ],
)
def test_exit_codes(install, capsys, error, code, words):
    def fail():
        raise error

    install(Entry("fail", fail))
    assert main(["fail"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1
    if code == exit_codes.BUG:
        assert "--debug for the traceback" in printed.err
    if isinstance(error, Exception):
        for arguments in (["--debug", "fail"], ["fail", "--debug"]):
            assert main(arguments) == code
            printed = capsys.readouterr().err
            assert printed.startswith("Traceback (most recent call last):")
            assert f"\n{type(error).__name__}" in printed or f".{type(error).__name__}: " in printed
            assert words in printed


def test_json_is_all_that_is_printed(install, capsys):
    def run():
        print("a library talks")
        return Outcome({"loss": float("nan"), "of": [1, float("inf")], "name": "ä"}, ["shown"])

    install(Entry("run", run))
    assert main(["run", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out, parse_constant=pytest.fail) == {"loss": None, "of": [1, None], "name": "ä"}
    assert printed.err == "a library talks\n"
    assert main(["run"]) == 0
    assert capsys.readouterr().out == "a library talks\nshown\n"


def test_unknown_flags_are_kept_for_a_command_that_passes_them_on(install):
    seen = []

    def run():
        seen.append(click.get_current_context().args)
        return Outcome({})

    passes = {"ignore_unknown_options": True, "allow_extra_args": True}
    install(Entry("run", run, context_settings=passes))
    assert main(["run", "--port", "1"]) == 0
    assert seen == [["--port", "1"]]


def test_a_command_that_cannot_be_loaded_does_not_stop_the_others(install, capsys):
    install(Entry("broken", error=ImportError("no module named x")), Entry("good"))
    assert main(["good"]) == 0
    assert "broken" not in capsys.readouterr().err
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert "\n  good" in printed.out
    assert "the command 'broken' is installed, but cannot be loaded: no module named x" in printed.err
    assert main(["broken"]) == exit_codes.USAGE
    assert "the command 'broken' is installed, but cannot be loaded: no module named x" in capsys.readouterr().err


def test_only_the_command_asked_for_is_loaded_and_while_flags_are_read(install):
    reading = []
    train, merge = Entry("train"), Entry("merge", lambda: reading.append(reading_flags()) or Outcome({}))
    merge.load = lambda: reading.append(reading_flags()) or merge.command
    install(train, merge)
    assert main(["--debug", "merge"]) == 0
    assert reading == [True, False]
    assert not train.loaded
    assert main(["--help"]) == 0
    assert train.loaded


def test_without_click_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "click", None)
    assert main(["--help"]) == exit_codes.USAGE
    assert capsys.readouterr().err == "doran: error: the `doran` command needs click: pip install 'doran-core[cli]'\n"


TABLE = Table(["layer", "rank"], [["q_proj [1]", "8"], ["v", "16"]])


def test_a_table_in_a_pipe_is_plain_columns(capsys):
    tables.show(["first", TABLE, Table([], [["name", "x"], ["longer", "y"]])])
    lines = [
        "first",
        "layer       rank",
        "----------  ----",
        "q_proj [1]     8",
        "v             16",
        "name    x",
        "longer  y",
    ]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_table_on_a_terminal_is_drawn_by_rich(monkeypatch):
    pytest.importorskip("rich", reason="it draws the tables")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    tables.show([TABLE, Table([], [["name", "[x]"]])])
    drawn = sys.stdout.getvalue()
    assert "─" in drawn
    assert "q_proj [1]" in drawn
    assert "[x]" in drawn
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    tables.show([TABLE])
    assert sys.stdout.getvalue() == TABLE.plain() + "\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    assert "_DORAN_COMPLETE" in script.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: the script is not parsed")
    subprocess.run([shell, "-n", str(script)], check=True)


def test_bash_completes_commands_flags_and_choices():
    def completions(*words):
        words = ("doran", *words)
        asked = {"_DORAN_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": f"{len(words) - 1}"}
        command = [sys.executable, "-m", "doran_core.cli"]
        done = subprocess.run(command, env=os.environ | asked, check=True, capture_output=True, text=True)
        return [line.split(",", 1)[1] for line in done.stdout.split()]

    assert completions("conv") == ["convert"]
    assert completions("merge", "--all") == ["--allow-base-mismatch"]
    assert set(completions("convert", "x", "--to", "''")) >= {"folded", "peft-dora"}


def test_a_reader_that_leaves_is_no_error():
    code = "from doran_core.cli.main import main; raise SystemExit(main(['completion', 'bash']))"
    line = f'{sys.executable} -c "{code}"; echo $? >&2'
    done = subprocess.run(f"({line}) | true", shell=True, capture_output=True, text=True)
    assert done.stderr == "0\n"


def test_a_pipe_that_breaks_inside_a_command_is_an_error(install, capsys):
    def fail():
        raise BrokenPipeError(32, "Broken pipe")

    install(Entry("fail", fail))
    assert main(["fail"]) == exit_codes.SYSTEM
    assert "Broken pipe" in capsys.readouterr().err
