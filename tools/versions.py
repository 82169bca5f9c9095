"""The one version of all four packages: where it is written, and how it is moved. ``nox -s bump -- 0.2.0``.

It stands in each pyproject.toml, in the ranges in which the packages ask for doran-core, in the newest heading of each
changelog, and in CITATION.cff. tests/test_versions.py holds them together. Needs the standard library alone.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

__all__ = ["NAMES", "bump", "core_range", "written_versions"]

NAMES = ("doran-core", "doran-export", "doran-hf", "doran-serve")

_VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")
_PYPROJECT = re.compile(r'^version = "([^"]+)"$', re.MULTILINE)
_RANGE = re.compile(r'"doran-core\[cli\](>=[^"]+)"')
_HEADING = re.compile(r"^## (\S+)( \(unreleased\))?$", re.MULTILINE)
_CITATION = re.compile(r"^version: (\S+)$", re.MULTILINE)


def core_range(version: str) -> str:
    """The range of doran-core that goes with a version: its own minor version, for the format of 0.x may change."""
    major, minor, _ = version.split(".", 2)
    return f">={major}.{minor},<{major}.{int(minor) + 1}"


def written_versions(root: Path) -> dict[str, str]:
    """Every place where the version stands, and what stands there; ranges as the version's :func:`core_range`."""
    found = {"CITATION.cff": _find(_CITATION, root / "CITATION.cff")}
    for name in NAMES:
        folder = root / "packages" / name
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
        found[f"{name}/pyproject.toml"] = project["version"]
        found[f"{name}/CHANGELOG.md"] = _find(_HEADING, folder / "CHANGELOG.md")
        if name != "doran-core":
            found[f"{name}/pyproject.toml, doran-core"] = _find(_RANGE, folder / "pyproject.toml")
    return found


def _find(pattern: re.Pattern[str], file: Path) -> str:
    match = pattern.search(file.read_text("utf-8"))
    if match is None:
        raise SystemExit(f"{file}: no line like {pattern.pattern}")
    return match.group(1)


def bump(root: Path, version: str) -> list[Path]:
    """Write a version everywhere. A changelog whose newest heading is unreleased has it renamed, else gets a new one.

    Returns:
        The files that were changed.

    Raises:
        SystemExit: not a version, or a file is not as expected; nothing has been written.
    """
    if not _VERSION.fullmatch(version):
        raise SystemExit(f"{version!r} is no version: expected three numbers, such as 0.2.0 or 0.2.0rc1")
    written_versions(root)  # all places are there
    texts = {root / "CITATION.cff": _CITATION.sub(f"version: {version}", _text(root / "CITATION.cff"))}
    for name in NAMES:
        folder = root / "packages" / name
        text = _PYPROJECT.sub(f'version = "{version}"', _text(folder / "pyproject.toml"), count=1)
        texts[folder / "pyproject.toml"] = _RANGE.sub(f'"doran-core[cli]{core_range(version)}"', text)
        texts[folder / "CHANGELOG.md"] = _headed(_text(folder / "CHANGELOG.md"), version)
    changed = [file for file, text in texts.items() if text != _text(file)]
    for file in changed:
        file.write_text(texts[file], encoding="utf-8")
    return changed


def _headed(text: str, version: str) -> str:
    heading = f"## {version} (unreleased)"
    newest = _HEADING.search(text)
    if newest is None or newest.group(1) == version:
        return text
    if newest.group(2):
        return text[: newest.start()] + heading + text[newest.end() :]
    return f"{text[: newest.start()]}{heading}\n\n{text[newest.start() :]}"


def _text(file: Path) -> str:
    return file.read_text("utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tools/versions.py VERSION")
    for path in bump(Path(__file__).parents[1], sys.argv[1]):
        print(path)
