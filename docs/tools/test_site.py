"""The built site: every public name in the reference, every internal link and anchor, nothing from the network.

Needs ``mkdocs build`` to have run; the session `docs` does that first.
"""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from mkdocstrings import Inventory
from places import REPOSITORY
from public_names import public_names

SITE = REPOSITORY / "build" / "site"
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Tags whose target a browser fetches by itself."""


class Page(HTMLParser):
    """Anchors and targets of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        target = given.get(LOADED.get(tag, ""))
        if target is not None and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(target)


@cache
def pages() -> dict[Path, Page]:
    """Every page of the site."""
    found = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(SITE.rglob("*.html"))}
    assert len(found) > 30, f"{SITE}: run `mkdocs build` first"
    return found


def target_of(page: Path, link: str) -> tuple[Path, str]:
    """File and anchor that an internal link leads to."""
    path, anchor = urldefrag(link)
    file = SITE / path.lstrip("/") if path.startswith("/") else page.parent / unquote(path) if path else page
    file = file.resolve()
    return (file / "index.html" if file.is_dir() else file), unquote(anchor)


def test_links_and_anchors_resolve() -> None:
    broken = []
    for file, page in pages().items():
        if file.name == "404.html":
            continue  # its links are absolute, below an address that is not known here
        for link in page.links + page.loaded:
            if urlsplit(link).scheme:
                continue
            target, anchor = target_of(file, link)
            anchored = not anchor or anchor == "__top" or target not in pages() or anchor in pages()[target].anchors
            if not (target.is_file() and anchored):
                broken.append(f"{file.relative_to(SITE)}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere() -> None:
    outside = [
        f"{file.relative_to(SITE)}: {target}"
        for file, page in pages().items()
        for target in page.loaded
        if urlsplit(target).scheme in ("http", "https") or target.startswith("//")
    ]
    assert not outside
    sheets = [sheet for sheet in SITE.rglob("*.css") if re.search(r"url\(['\"]?https?:", sheet.read_text("utf-8"))]
    assert not sheets


@pytest.mark.parametrize("package", ["doran_core", "doran_hf", "doran_export", "doran_serve"])
def test_every_public_name_is_in_the_reference(package: str) -> None:
    with (SITE / "objects.inv").open("rb") as file:
        shown = set(Inventory.parse_sphinx(file, domain_filter=["py"]))
    names = [name for name in public_names() if name.module.partition(".")[0] == package and not name.is_module]
    assert names
    missing = sorted(
        {f"{name.module}.{name.name}" for name in names} - {f"{n.module}.{n.name}" for n in names if n.home in shown}
    )
    assert not missing
