"""Each package installs alone from a clone, and is fit for an index. Really built; needs no torch."""

import email
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from versions import core_range

PACKAGES = Path(__file__).parents[1] / "packages"
CORE = PACKAGES / "doran-core"
DEPENDENT = [PACKAGES / f"doran-{name}" for name in ("hf", "export", "serve")]
VERSION = tomllib.loads((CORE / "pyproject.toml").read_text())["project"]["version"]
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
    assert core_requirements(build("wheel", package, tmp_path)) == [f"doran-core[cli] @ {CORE.as_uri()}"]
    plain = core_requirements(build("wheel", package, tmp_path, DORAN_RELEASE="1"))
    assert list(map(Requirement, plain)) == [Requirement(f"doran-core[cli]{core_range(VERSION)}")]
    assert core_requirements(build("editable", package, tmp_path)) == plain

    sdist = build("sdist", package, tmp_path)
    subprocess.run([sys.executable, "-m", "tarfile", "-e", sdist, tmp_path / "unpacked"], check=True)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert core_requirements(build("wheel", unpacked, tmp_path)) == plain


def test_the_hook_is_the_same_in_every_package():
    assert len({(package / "hatch_build.py").read_text() for package in DEPENDENT}) == 1


def test_doran_core_is_what_the_plain_requirement_allows():
    assert Requirement(f"doran-core[cli]{core_range(VERSION)}").specifier.contains(VERSION)


@pytest.fixture(scope="module", params=[CORE, *DEPENDENT], ids=lambda path: path.name)
def released(request, tmp_path_factory):
    """(package, source distribution, wheel made from it), as `python -m build` makes them for an index."""
    out = tmp_path_factory.mktemp(request.param.name)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(request.param)],
        env=os.environ | {"DORAN_RELEASE": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return request.param, sdist, wheel


def test_an_index_takes_them(released):
    _, sdist, wheel = released
    command = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_what_they_hold(released):
    package, sdist, wheel = released
    import_name = package.name.replace("-", "_")
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    dist_info = f"{import_name}-{VERSION}.dist-info"
    assert {f"{import_name}/py.typed", f"{dist_info}/licenses/LICENSE"} <= in_wheel
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", f"src/{import_name}/py.typed"} <= in_sdist
    assert {name.partition("/")[0] for name in in_wheel} == {import_name, dist_info}
    files = (package / "src").rglob("*.py*")  # a lazy package reads its names from __init__.pyi
    sources = {str(path.relative_to(package / "src")) for path in files if path.suffix in (".py", ".pyi")}
    assert {name for name in in_wheel if name.endswith((".py", ".pyi"))} == sources


def test_what_they_say(released):
    package, _, wheel = released
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(opened.read(name))
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == (
        package.name,
        VERSION,
        "Apache-2.0",
    )
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Project-URL"] == "Paper, https://arxiv.org/abs/2510.04331"
    assert all(metadata[field] for field in ("Summary", "Keywords", "Author", "Requires-Python"))
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert (package / "LICENSE").read_text() == (PACKAGES.parent / "LICENSE").read_text()
    assert metadata.get_payload().strip() == (package / "README.md").read_text().strip()
