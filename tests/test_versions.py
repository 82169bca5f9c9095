"""One version in all places, and the command that moves it."""

import shutil
from pathlib import Path

import pytest
from versions import NAMES, bump, core_range, written_versions

ROOT = Path(__file__).parents[1]
PLACES = 1 + 2 * 4 + 3


@pytest.fixture
def copy(tmp_path):
    """The files that hold the version, alone."""
    shutil.copy(ROOT / "CITATION.cff", tmp_path)
    for name in NAMES:
        (tmp_path / "packages" / name).mkdir(parents=True)
        for file in ("pyproject.toml", "CHANGELOG.md"):
            shutil.copy(ROOT / "packages" / name / file, tmp_path / "packages" / name)
    return tmp_path


def test_all_places_agree():
    found = written_versions(ROOT)
    assert len(found) == PLACES
    version = found["doran-core/pyproject.toml"]
    for place, value in found.items():
        assert value == (core_range(version) if place.endswith(", doran-core") else version), place


def test_no_version_is_written_in_the_code():
    for file in (ROOT / "packages").glob("*/src/**/*.py"):
        assert "__version__ =" not in file.read_text(), file


def test_bump_moves_all_of_them(copy):
    changed = bump(copy, "1.4.0rc1")
    assert len(changed) == 9
    assert set(written_versions(copy).values()) == {"1.4.0rc1", ">=1.4,<1.5"}
    assert bump(copy, "1.4.0rc1") == []
    before = {file: file.read_text() for file in copy.rglob("*.toml")}
    bump(copy, "1.4.0")
    for file, text in before.items():  # nothing else has moved
        assert file.read_text() == text.replace("1.4.0rc1", "1.4.0")


def test_a_changelog_of_a_release_gets_a_new_heading(copy):
    log = copy / "packages" / "doran-core" / "CHANGELOG.md"
    log.write_text("# Changelog of doran-core\n\n## 0.1.0\n\n- First.\n")
    bump(copy, "0.2.0")
    assert log.read_text() == "# Changelog of doran-core\n\n## 0.2.0 (unreleased)\n\n## 0.1.0\n\n- First.\n"
    bump(copy, "0.3.0")  # 0.2.0 was not released
    assert log.read_text() == "# Changelog of doran-core\n\n## 0.3.0 (unreleased)\n\n## 0.1.0\n\n- First.\n"


def test_what_is_refused_changes_nothing(copy):
    with pytest.raises(SystemExit, match="'2' is no version"):
        bump(copy, "2")
    (copy / "packages" / "doran-serve" / "CHANGELOG.md").write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"CHANGELOG\.md: no line like"):
        bump(copy, "0.9.0")
    assert 'version = "0.9.0"' not in (copy / "packages" / "doran-core" / "pyproject.toml").read_text()
