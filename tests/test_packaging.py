"""Each package installs alone from a clone; a wheel for an index names no folder. Builds really, and needs no torch."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
CORE = PACKAGES / "doran-core"
DEPENDENT = [PACKAGES / f"doran-{name}" for name in ("hf", "export", "serve")]
BUILD_WHEEL = "from hatchling.build import build_{} as build; import sys; print(build(sys.argv[1]))"


def core_requirements(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        lines = opened.read(name).decode().splitlines()
    return [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: doran-core")]


def build(kind, source, out, **environment):
    """Call hatchling as pip does; returns the file."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD_WHEEL.format(kind), str(out)],
        cwd=source,
        env=os.environ | {"DORAN_RELEASE": ""} | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return out / done.stdout.split()[-1]


@pytest.mark.parametrize("package", DEPENDENT, ids=lambda path: path.name)
def test_where_doran_core_comes_from(package, tmp_path):
    assert core_requirements(build("wheel", package, tmp_path)) == [f"doran-core @ {CORE.as_uri()}"]
    plain = core_requirements(build("wheel", package, tmp_path, DORAN_RELEASE="1"))
    assert plain == ["doran-core<0.2,>=0.1"]
    assert core_requirements(build("editable", package, tmp_path)) == plain

    sdist = build("sdist", package, tmp_path)
    subprocess.run([sys.executable, "-m", "tarfile", "-e", sdist, tmp_path / "unpacked"], check=True)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert core_requirements(build("wheel", unpacked, tmp_path)) == plain


def test_the_hook_is_the_same_in_every_package():
    assert len({(package / "hatch_build.py").read_text() for package in DEPENDENT}) == 1


def test_doran_core_is_what_the_plain_requirement_allows(tmp_path):
    assert build("wheel", CORE, tmp_path).name.startswith("doran_core-0.1.")
