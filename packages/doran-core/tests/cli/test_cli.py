"""doran_core's own commands: what they print and write, and their errors, one sentence each with exit code 2."""

import json
import sys

import made
import pytest

from doran_core.adapter import FoldedAdapter, PeftAdapter, read_adapter
from doran_core.cli.main import main
from doran_core.merge import merge_checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    made.write_adapter(tmp_path / "adapter", weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, *arguments):
    """Run a command that must fail in one sentence; return the sentence."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("doran: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_merge(folder, capsys):
    assert main(["merge", "--base", "base", "--adapter", "adapter", "--out", "out"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "wrote out\n"
    assert "merging 100%" in captured.err
    merge_checkpoint("base", "adapter", "expected")
    assert made.folder_bytes(folder / "out") == made.folder_bytes(folder / "expected")


def test_results_as_json(folder, capsys):
    command = "merge --base base --adapter adapter --weight 0.5 --out out --dtype float16 --json"
    assert main(command.split()) == 0
    assert json.loads(capsys.readouterr().out) == {
        "written": "out",
        "base": "base",
        "adapters": [{"directory": "adapter", "weight": 0.5}],
        "dtype": "float16",
    }
    assert main(["convert", "adapter", "--to", "folded", "--base", "base", "--out", "folded", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": "folded", "form": "folded"}


def test_merge_with_weights_and_dtype(folder):
    made.write_adapter(folder / "second", made.base_weights(), seed=8)
    command = "merge --base base --adapter adapter --weight 0.5 --adapter second --weight 2 --out out --dtype float16"
    assert main(command.split()) == 0
    assert json.loads((folder / "out" / "config.json").read_text())["dtype"] == "float16"


def test_convert(folder):
    assert main(["convert", "adapter", "--to", "folded", "--base", "base", "--out", "folded"]) == 0
    assert isinstance(read_adapter("folded"), FoldedAdapter)
    assert main(["convert", "folded", "--to", "peft-dora", "--base", "base", "--out", "dora"]) == 0
    assert isinstance(read_adapter("dora"), PeftAdapter)
    assert main(["convert", "dora", "--to", "folded", "--base", "base", "--out", "folded", "--overwrite"]) == 0


def test_inspect(folder, capsys):
    assert main(["inspect", "adapter"]) == 0
    printed = capsys.readouterr().out
    assert "trainable" in printed
    rows = [line.split()[0] for line in printed.splitlines() if line.startswith("model.layers")]
    assert rows == sorted(made.TARGETS)
    assert main(["inspect", "adapter", "--base", "base", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["form"] == "trainable"
    assert report["layers"][0]["change"] > 0


def test_inspect_plot(folder):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert main(["inspect", "adapter", "--plot", "adapter.png"]) == 0
    assert (folder / "adapter.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'doran-core[plot]'" in fails(capsys, "inspect", "adapter", "--plot", "adapter.png")
    assert not (folder / "adapter.png").exists()


@pytest.mark.parametrize("name", ["nowhere/adapter.png", "adapter.unknown"])
def test_a_plot_that_cannot_be_written(folder, capsys, name):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert f"cannot write {name}" in fails(capsys, "inspect", "adapter", "--plot", name)
    assert not (folder / name).exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("merge --base nowhere --adapter adapter --out out", "nowhere: no such checkpoint directory"),
        ("merge --base base --adapter nowhere --out out", "nowhere: no such adapter directory"),
        ("merge --base base --adapter adapter --out base", "exists and is not empty"),
        ("merge --base base --adapter adapter --weight 1 --weight 2 --out out", "1 --adapter and 2 --weight"),
        ("inspect nowhere", "nowhere: no such adapter directory"),
        ("inspect base", "adapter_config.json is missing"),
        ("convert adapter --to folded --base base --out adapter", "overwrite"),
        ("convert adapter --to folded --base adapter --out out", "no model.safetensors"),
    ],
)
def test_errors_of_the_user(folder, capsys, command, words):
    before = made.folder_bytes(folder)
    assert words in fails(capsys, *command.split())
    assert made.folder_bytes(folder) == before


@pytest.mark.parametrize(
    "command",
    [
        "merge --base other --adapter adapter --out out",
        "convert adapter --to folded --base other --out out",
        "inspect adapter --base other --plot out",
    ],
)
def test_another_base_names_both_fingerprints(folder, capsys, command):
    if "--plot" in command:
        pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    made.write_base(folder / "other", {key: weight * 2 for key, weight in made.base_weights().items()})
    before = made.folder_bytes(folder)
    assert fails(capsys, *command.split()).count("sha256:") == 2
    assert made.folder_bytes(folder) == before
    command = command.replace("--plot out", "--plot out.png")
    assert main([*command.split(), "--allow-base-mismatch"]) == 0


def test_an_interrupt_is_not_a_traceback(folder, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("doran_core.merge.merge_checkpoint", interrupt)
    assert main(["merge", "--base", "base", "--adapter", "adapter", "--out", "out"]) == 130
    assert "run the same command again" in capsys.readouterr().err
