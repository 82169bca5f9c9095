"""`doran train` and `doran plot` before they run: what they import, and what they say to a misspelt flag."""

from __future__ import annotations

import subprocess
import sys

import pytest

from doran_core.cli.main import main

HEAVY = {"torch", "transformers", "peft", "datasets", "doran_hf.config"}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plot", "--help"]])
def test_help_imports_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = f"""
import sys
from doran_core.cli.main import main
main({arguments})
print(sorted({HEAVY} & set(sys.modules)), "doran_hf" in sys.modules)
"""
    assert python(code).splitlines()[-1] == "[] True"


def test_the_package_is_whole_after_its_flags_were_read() -> None:
    code = """
from doran_core.cli.group import parse
parse(["train"])
import sys
print("peft" in sys.modules)
import doran_hf
print(all(getattr(doran_hf, name) for name in doran_hf.__all__), doran_hf.__version__)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
print(PEFT_TYPE_TO_CONFIG_MAPPING["DORAN"] is doran_hf.DoranConfig)
"""
    first, second, third = python(code).splitlines()
    assert (first, second.split()[0], third) == ("False", "True", "True")


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--adapter.rnk", "--adapter.rank"),
        ("--data.trian", "--data.train"),
        ("--trainer.lerning_rate", "--trainer.lea"),
    ],
)
def test_a_misspelt_flag_gets_the_nearest(flag: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", flag, "3"]) == 2
    assert nearest in capsys.readouterr().err


def test_nothing_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "doran train --init writes one" in capsys.readouterr().err
