"""What MkDocs does besides rendering docs/: pages that are made from the code and from files of the root.

``<!-- names: MODULE -->`` in a page of the reference stands for everything that the module lists in ``__all__``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

from cli_page import cli_page
from places import PACKAGES, REPOSITORY
from public_names import names_of_module, public_names

NAMES = re.compile(r"^<!-- names: (\S+) -->$", re.MULTILINE)
FORMULA = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""LaTeX, as GitHub typesets it too. Browsers draw MathML themselves, so that a page loads no script for it."""
TABLE_ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
INSIDE_A_VALUE = re.compile(r"(?<=\d) (?=±|(?:s|ms|kB|MB|MiB|GB|GiB)\b)|(?<=±) (?=\d)")
"""Spaces of values such as "4.1 s" and "0.33 ± 0.29", at which a narrow column would break them."""
IDENTIFIER = re.compile(r"^::: (\S+)$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the experiments, a study each, into the section of the results."""
    assert config.nav is not None
    (results,) = (section["Results"] for section in config.nav if "Results" in section)
    studies = sorted(Path(config.docs_dir, "results", "experiments").glob("*.md"))
    pages = ["results/experiments.md", *(f"results/experiments/{file.name}" for file in studies)]
    results.insert(1, {"Do the paper's claims hold?": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "reference/cli.md": cli_page(),
        "reference/modules.md": _other_names(Path(config.docs_dir) / "reference"),
        "contributing.md": _contributing(),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Names of modules, each where the page first has it; formulas as MathML; values of tables on one line."""
    shown: set[str] = set()
    markdown = FORMULA.sub(lambda match: convert(match[1].strip(), display="block"), markdown)
    markdown = TABLE_ROW.sub(lambda match: INSIDE_A_VALUE.sub("\N{NO-BREAK SPACE}", match[0]), markdown)
    return NAMES.sub(lambda match: _identifiers(match[1], shown), markdown)


def _identifiers(module: str, shown: set[str]) -> str:
    try:
        names = names_of_module(module)
    except KeyError as error:
        raise PluginError(f"names: {error}") from error
    new = [name.home for name in names if not name.is_module and name.home not in shown]
    shown.update(new)
    return "\n\n".join(f"::: {home}" for home in new)


def _other_names(folder: Path) -> str:
    """The page of all names that no written page of the reference shows."""
    shown = set()
    for page in folder.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        shown |= set(IDENTIFIER.findall(text))
        shown |= {name.home for module in NAMES.findall(text) for name in names_of_module(module)}
    parts = [
        "# Every other name\n",
        "What the modules list in `__all__` beside the names of the pages before. It may change with any release.\n",
    ]
    for package in PACKAGES:
        parts.append(f"## doran_{package}\n")
        for name in public_names():
            if name.module.partition(".")[0] == f"doran_{package}" and name.home not in shown and not name.is_module:
                shown.add(name.home)
                parts.append(f"::: {name.home}\n    options:\n      show_root_full_path: true\n")
    return "\n".join(parts)


def _contributing() -> str:
    """CONTRIBUTING.md of the root, with its links as this site has them."""
    file = REPOSITORY / "CONTRIBUTING.md"
    if not file.is_file():
        raise PluginError(f"{file} is not there; the page Contributing is made of it")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", _site_link, file.read_text(encoding="utf-8"))


def _site_link(match: re.Match[str]) -> str:
    text, target = match[1], match[2]
    if target.startswith("docs/"):
        return f"[{text}]({target.removeprefix('docs/')})"
    return text if target in text else f"{text} (`{target}`)"
