"""The frame of the `doran` command: what it imports, help, exit codes, near names, JSON, tables, completion."""

import io
import json
import shutil
import subprocess
import sys

import pytest

import doran_core
from doran_core.cli import exit_codes, loading, tables
from doran_core.cli import main as main_module
from doran_core.cli.command import Command, Outcome
from doran_core.cli.main import build_parser, main
from doran_core.cli.tables import Table
from doran_core.errors import CheckFailedError, ConfigError

OWN = ("completion", "convert", "inspect", "merge")


class Entry:
    """An entry point of a package that is installed."""

    def __init__(self, name, run=None, error=None, **more):
        self.name, self.error, self.loaded = name, error, False
        run = run or (lambda arguments: Outcome({}))
        self.command = Command("a summary", "A description.", "shell", lambda *_: None, run, **more)

    def load(self):
        self.loaded = True
        if self.error:
            raise self.error
        return self.command


@pytest.fixture
def install(monkeypatch):
    """Make these the installed commands."""

    def install(*entries):
        monkeypatch.setattr(loading, "entry_points", lambda group: list(entries))

    return install


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in OWN)])
def test_what_only_prints_imports_no_torch(arguments):
    code = f"""
import sys
from doran_core.cli.main import main
try:
    main({arguments})
except SystemExit as ended:
    print(ended.code, "torch" in sys.modules, "rich" in sys.modules)
"""
    assert python(code).splitlines()[-1] == "0 False False"


def test_importing_the_package_imports_no_torch_and_each_name_has_a_home():
    assert python("import sys, doran_core; print('torch' in sys.modules)") == "False\n"
    assert set(doran_core._HOMES) == set(doran_core.__all__)
    assert all(hasattr(doran_core, name) for name in (*doran_core.__all__, "__version__"))
    assert callable(doran_core.adapt)
    with pytest.raises(AttributeError, match="module 'doran_core' has no attribute 'nonsense'"):
        doran_core.nonsense  # noqa: B018


def test_help_has_groups_examples_and_exit_codes():
    printed = build_parser(["--help"]).format_help()
    assert "\nadapters:\n  convert " in printed
    assert printed.index("\nadapters:") < printed.index("\nshell:") < printed.index("\noptions:")
    assert all(f"\n  {code:<5}" in printed for code in exit_codes.MEANINGS)


def test_every_command_has_examples_that_parse():
    parser = build_parser()
    for name, entry in loading.command_entries().items():
        command = entry.load()
        assert command.examples, name
        for example in command.examples:
            words = example.split("#")[0].split("|")[0].split(">")[0].split()
            assert words[:2] == ["doran", name]
            if "{" not in example:
                _, unknown = parser.parse_known_args(words[1:])
                assert not unknown or command.passes_unknown


def test_installed_command():
    done = subprocess.run([sys.executable, "-m", "doran_core.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"doran-core {doran_core.__version__}\n" in done.stdout
    assert "\ntorch " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mrege"], "unknown command 'mrege'; did you mean merge?"),
        (["zzz"], "unknown command 'zzz'; there are "),
        (
            ["inspect", "adapter", "--jsn"],
            "unrecognized arguments: --jsn; did you mean --json? See: doran inspect --help",
        ),
        (["merge", "--bse=x", "--out", "y"], "required: --base, --adapter; did you mean --base?"),
        (["merge", "--allow-base"], "did you mean"),  # not an abbreviation of --allow-base-mismatch
        (["convert", "adapter", "--to", "compild", "--base", "b", "--out", "o"], "invalid choice: 'compild'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_misspelt(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
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
    def fail(arguments):
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
            with pytest.raises(type(error)):
                main(arguments)


def test_json_is_all_that_is_printed(install, capsys):
    def run(arguments):
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

    def run(arguments):
        seen.append(arguments.unknown)
        return Outcome({})

    install(Entry("run", run, passes_unknown=True))
    assert main(["run", "--port", "1"]) == 0
    assert seen == [["--port", "1"]]


def test_a_command_that_cannot_be_loaded_does_not_stop_the_others(install, capsys):
    install(Entry("broken", error=ImportError("no module named x")), Entry("good"))
    assert main(["good"]) == 0
    assert "broken" not in capsys.readouterr().err
    assert "good" in build_parser(["--help"]).format_help()
    assert "the command 'broken' cannot be loaded: no module named x" in capsys.readouterr().err
    assert main(["broken"]) == exit_codes.USAGE
    assert "the command 'broken' is installed, but cannot be loaded" in capsys.readouterr().err


def test_only_the_command_asked_for_is_loaded_and_while_flags_are_read(install):
    reading = []
    train, merge = (
        Entry("train"),
        Entry("merge", lambda arguments: reading.append(loading.reading_flags()) or Outcome({})),
    )
    merge.load = lambda: reading.append(loading.reading_flags()) or merge.command
    install(train, merge)
    assert main(["--debug", "merge"]) == 0
    assert reading == [True, False]
    assert not train.loaded
    build_parser()
    assert train.loaded


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


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys, tmp_path):
    pytest.importorskip("shtab", reason="it writes the completion")
    assert main(["completion", shell]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    assert all(word in script.read_text() for word in (*OWN, "--allow-base-mismatch", "peft-dora"))
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: the script is not parsed")
    subprocess.run([shell, "-n", str(script)], check=True)


def test_bash_completes_commands_and_flags(capsys, tmp_path):
    pytest.importorskip("shtab", reason="it writes the completion")
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)

    def completions(*words):
        line = f"""
source {script}
COMP_WORDS=(doran {" ".join(words)}); COMP_CWORD={len(words)}
_shtab_doran; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        done = subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True)
        return done.stdout.split()

    assert completions("conv") == ["convert"]
    assert completions("merge", "--all") == ["--allow-base-mismatch"]
    assert set(completions("convert", "x", "--to", "''")) >= {"compiled", "peft-dora"}


def test_completion_without_shtab_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == exit_codes.USAGE
    assert "pip install 'doran-core[cli]'" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error():
    code = "from doran_core.cli.main import main; main(['--version'])"
    done = subprocess.run(f'{sys.executable} -c "{code}" | head -c 1', shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert main_module.__all__
