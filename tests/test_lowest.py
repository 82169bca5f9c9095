"""The pins of ``nox -s lowest``."""

import tomllib
from pathlib import Path

import pytest
from lowest import lowest_pins

PACKAGES = Path(__file__).parents[1] / "packages"


def test_pins(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch>=2.11", "doran-core>=0.1,<0.2", "onnx-ir>=1.0,<2", "x==3"]\n'
        '[project.optional-dependencies]\nplot = ["matplotlib>=3.8"]\nbad = ["loose<2"]\n'
    )
    assert lowest_pins(tmp_path) == ["onnx-ir==1.0", "torch==2.11", "x==3"]
    assert lowest_pins(tmp_path, ["plot"], without=["torch", "x"]) == ["matplotlib==3.8", "onnx-ir==1.0"]
    with pytest.raises(ValueError, match="loose<2 has no lower end"):
        lowest_pins(tmp_path, ["bad"])


@pytest.mark.parametrize("package", sorted(PACKAGES.iterdir()), ids=lambda path: path.name)
def test_every_requirement_has_a_lower_end(package):
    extras = tomllib.loads((package / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert lowest_pins(package, extras)
